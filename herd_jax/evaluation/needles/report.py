"""`python -m herd_jax.evaluate needle`: runs a needle test and writes its numbers, items and picture."""

import math
from collections.abc import Sequence

import numpy as np

from herd_jax.errors import UserError
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.evaluation.needles.haystack import read_haystack
from herd_jax.evaluation.needles.recall import NeedleResult, multi_lengths, multi_needle_recall, needle_recall
from herd_jax.evaluation.results import half_interval
from herd_jax.model import Model
from herd_jax.page.figure import figure_file

DEPTHS = tuple(tenth / 10 for tenth in range(11))


def evaluate_needle(
    evaluation: Evaluation, lengths: Sequence[int], depths: Sequence[float], files: Sequence[str], multi: bool, *,
    num_samples: int, template: str, in_dialog: bool, seed: int,
) -> str:  # fmt: skip
    """Runs `needle_recall`, or `multi_needle_recall` where `multi`, in the text of `files`; returns what the command prints.

    Writes `needle.json` or `multi-needle.json`, the items and a PNG. Raises UserError as they do, for depths of the multi-needle test, and
    for a model whose outputs are not finite.
    """
    if multi and depths:
        raise UserError("--multi hides its needles at random depths: leave --depths out")
    if seed < 0:
        raise UserError(f"--seed is {seed}: it must be 0 or more")
    model = evaluation.model
    check_finite(model)
    haystack = read_haystack(files, model.text_tokenizer())
    name = "multi-needle" if multi else "needle"
    lengths = tuple(lengths) or (multi_lengths(model.context_length) if multi else default_lengths(model))
    evaluation.check_directory()
    asked = {"template": template, "in_dialog": in_dialog, "seed": seed}
    if multi:
        result = multi_needle_recall(model, lengths, num_samples, haystack, **asked)
    else:
        result = needle_recall(model, lengths, tuple(depths) or DEPTHS, num_samples, haystack, **asked)
    settings = {"num_samples": num_samples, "haystack": list(files) or "Python's manual", **asked}
    evaluation.write_items(name, result.items)
    json_file = evaluation.write(name, settings, numbers(result))
    picture = evaluation.directory / f"{name}.png"
    with figure_file(picture, 1.5 + 0.7 * len(lengths), 4) as figure:
        draw(figure.add_subplot(), result)
    return f"{table(result)}\nwritten: {json_file}, {picture}"


def check_finite(model: Model) -> None:
    """Raises UserError where the model's outputs are not finite: it would be told that it found no needle."""
    (loss,) = model.loss(["What is asked for?"])
    if not math.isfinite(loss.nats_per_token):
        raise UserError("the model's outputs are not finite: its weights are damaged; give another checkpoint")


def default_lengths(model: Model) -> tuple[int, ...]:
    """Returns the model's context (131,072 where none is known) and its halves, down to a sixteenth."""
    longest = model.context_length or 131_072
    return tuple(longest >> halved for halved in (4, 3, 2, 1, 0))


def numbers(result: NeedleResult) -> dict:
    """Returns the numbers for the JSON: `recall` is [lengths, depths], or [lengths] of the multi-needle test; `half_interval` is half of the
    95 % one of the mean."""
    mean, number = float(np.mean(result.recall)), len(result.items)
    return {
        "lengths": result.lengths, "depths": result.depths, "recall": result.recall,
        "mean": mean, "half_interval": half_interval(mean, number), "num_items": number,
    }  # fmt: skip


def table(result: NeedleResult) -> str:
    """Returns recall in percent, a line for each length."""
    columns = [f"{depth:.0%}" for depth in result.depths] or ["any"]
    rows = [[f"{100 * recall:.0f}" for recall in np.atleast_1d(of_length)] for of_length in result.recall]
    lines = [f"{'depth':>8} {''.join(f'{name:>6}' for name in columns)}"]
    lines += [f"{length:>8} {''.join(f'{cell:>6}' for cell in row)}" for length, row in zip(result.lengths, rows, strict=True)]
    return "\n".join([*lines, f"mean recall {np.mean(result.recall):.1%} of {len(result.items)} prompts"])


def draw(axes, result: NeedleResult, title: str = "") -> None:
    """Draws the heat map, length by depth, onto matplotlib axes; of the multi-needle test one row of any depth."""
    grid = np.atleast_2d(result.recall if result.depths else result.recall[:, None])
    axes.imshow(grid.T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(result.lengths)), [f"{length:,}" for length in result.lengths], rotation=45 if len(result.lengths) > 6 else 0)
    axes.set_yticks(range(grid.shape[1]), [f"{depth:.0%}" for depth in result.depths] or ["any"])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title or f"needles found: {np.mean(grid):.1%}")
    for column, of_length in enumerate(grid):
        for row, recall in enumerate(of_length):
            axes.text(column, row, f"{100 * recall:.0f}", ha="center", va="center", fontsize=7)
