"""`python -m herd_jax.evaluate fp8`: measures a model and its FP8 variants, and writes numbers, answers and a picture."""

import json
import textwrap
from pathlib import Path

import numpy as np

from herd_jax.errors import UserError
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.evaluation.fp8.prompts import PROMPTS
from herd_jax.evaluation.fp8.quality import QUANTILES, Answers, Measured, Score, compare, likelihood_under, measure, worst_pairs
from herd_jax.files import user_path, write_whole
from herd_jax.interop.load import open_source
from herd_jax.model import load
from herd_jax.page.figure import figure_file

NUM_WORST = 5


def evaluate_fp8(
    evaluation: Evaluation, answers: Answers, *, reward: str | None = None, prompts_file: str | None = None, texts_file: str | None = None,
    score: Score | None = None,
) -> str:  # fmt: skip
    """Measures the model and its variants as `measure` says; writes `fp8.json`, `fp8-answers.jsonl` and `fp8.png`, and returns the tables to
    print.

    Answers are scored by `score`, else by their likelihood under the model at `reward`, else under the plain model. Prompts default to
    `PROMPTS`, texts to these. Raises UserError as `load` and `measure`, and for files without a line.
    """
    source = open_source(evaluation.path)
    prompts = read_lines(prompts_file) if prompts_file else list(PROMPTS)
    texts = read_lines(texts_file) if texts_file else prompts
    evaluation.check_directory()
    mesh, dtype = evaluation.mesh, evaluation.dtype
    if score is None and reward is not None:
        score = likelihood_under(load(reward, mesh, dtype), answers.chats)
    found = dict(measure(source, prompts, texts, answers, score, mesh=mesh, dtype=dtype))
    plain = found.pop("plain")
    numbers = {name: compare(plain, variant) for name, variant in found.items()}
    results = {
        "num_answers": len(plain.answers), "num_texts": len(texts), "loss": plain.losses.mean(), "quantile_levels": QUANTILES,
        "plain": {"mean": plain.scores.mean(), "quantiles": np.quantile(plain.scores, QUANTILES)}, "variants": numbers,
    }  # fmt: skip
    settings = {
        "reward": reward, "prompts": prompts_file, "texts": texts_file, "dtype": dtype, "max_new_tokens": answers.max_new_tokens,
        "temperature": answers.temperature, "samples": answers.samples, "seed": answers.seed, "chat": answers.chats,
    }  # fmt: skip
    written = [evaluation.write("fp8", settings, results), _write_answers(evaluation.directory, prompts, answers, plain, found)]
    picture = evaluation.directory / "fp8.png"
    with figure_file(picture, 3.2 * len(found), 3.2) as figure:
        draw(figure.subplots(1, len(found), sharex=True, sharey=True), plain, found, numbers)
    pairs = [prompts[i // answers.samples] for i in worst_pairs(plain, found["fp8"], NUM_WORST)]
    worst = _worst(pairs, plain, found["fp8"])
    return f"{table(plain, numbers)}\n\n{worst}\nwritten: {', '.join(map(str, [*written, picture]))}"


def read_lines(file: str) -> list[str]:
    """Returns the lines of a text file that are not blank."""
    try:
        lines = [line for line in user_path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text: give a file with one prompt or text a line") from error
    if not lines:
        raise UserError(f"{file} is empty: give a file with one prompt or text a line")
    return lines


def table(plain: Measured, numbers: dict[str, dict]) -> str:
    """Returns a line for each variant."""
    head = ("", "score", "change", "worst", "5 %", "median", "95 %", "KS", "p", "same", "drift", "largest")
    low, middle, high = (QUANTILES.index(q) for q in (0.05, 0.5, 0.95))
    line = lambda name, *cells: f"{name:<22}" + "".join(f"{cell:>10}" for cell in cells)
    of_plain = np.quantile(plain.scores, QUANTILES)
    rows = [line(*head), line("plain", f"{plain.scores.mean():.4f}", "", "", *(f"{of_plain[i]:.3f}" for i in (low, middle, high)))]
    for name, n in numbers.items():
        quantiles = (f"{n['quantiles'][i]:.3f}" for i in (low, middle, high))
        cells = f"{n['mean']:.4f}", f"{n['change']:+.4f}", f"{n['worst_change']:+.3f}", *quantiles, f"{n['ks']:.3f}", f"{n['p_value']:.2g}"
        rows.append(line(name, *cells, f"{n['same_answers']:.0%}", f"{n['drift']:+.4f}", f"{n['largest_drift']:+.4f}"))
    return "\n".join(rows)


def draw(all_axes, plain: Measured, variants: dict[str, Measured], numbers: dict[str, dict]) -> None:
    """Draws the distributions of scores: of the plain model filled, of a variant as a line."""
    everything = np.concatenate([plain.scores, *(variant.scores for variant in variants.values())])
    bins = np.linspace(everything.min(), everything.max() + 1e-6, 30)
    for axes, (name, variant) in zip(all_axes, variants.items(), strict=True):
        axes.hist(plain.scores, bins, color="0.8", label="plain")
        axes.hist(variant.scores, bins, histtype="step", color="C0", linewidth=1.5, label=name)
        axes.set_title(f"{name}: KS {numbers[name]['ks']:.3f} (p {numbers[name]['p_value']:.2g})", fontsize=9)
        axes.set_xlabel("score")
        axes.legend(fontsize=7)
    all_axes[0].set_ylabel("answers")


def _worst(prompts: list[str], plain: Measured, variant: Measured) -> str:
    short = lambda text: textwrap.shorten(text, 160, placeholder=" ...")
    parts = ["the answers that FP8 made worst:"]
    for prompt, i in zip(prompts, worst_pairs(plain, variant, NUM_WORST), strict=True):
        parts += [short(prompt), f"  plain {plain.scores[i]:8.3f}  {short(plain.answers[i])}", f"  fp8   {variant.scores[i]:8.3f}  {short(variant.answers[i])}"]
    return "\n".join(parts)


def _write_answers(directory: Path, prompts: list[str], answers: Answers, plain: Measured, variants: dict[str, Measured]) -> Path:
    lines = []
    for i, answer in enumerate(plain.answers):
        of = lambda measured: {"answer": measured.answers[i], "score": float(measured.scores[i])}
        found = {"prompt": prompts[i // answers.samples], "plain": {"answer": answer, "score": float(plain.scores[i])}}
        lines.append(json.dumps(found | {name: of(variant) for name, variant in variants.items()}, ensure_ascii=False) + "\n")
    return write_whole(directory / "fp8-answers.jsonl", "".join(lines))
