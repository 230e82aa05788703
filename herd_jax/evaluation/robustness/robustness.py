"""Whether a base model's answers to multiple choice change with how it is asked (section 5.1.1 of the paper): `evaluate robustness`.

The answer is the label with the least negative log-likelihood behind the prompt. An answer that stays wrong is robust too: besides the
accuracy of each variant and its spread, what counts is how many items are answered with another choice than in the study's first variant.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from herd_jax.errors import UserError
from herd_jax.evaluation.benchmarks.multiple_choice import Item, load_items
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.evaluation.results import half_interval
from herd_jax.evaluation.robustness.variants import NUM_CHOICES, NUM_SHOTS, Variant, distance, draw_shots, letters, studies
from herd_jax.inference.scoring.continuations import ContinuationScorer
from herd_jax.model import Model
from herd_jax.page.figure import figure_file

# Prompts and, of each, the continuations -> of each prompt the log-likelihoods, in nats, of its continuations.
Score = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[Sequence[float]]]
ORDER = "answer order"  # the study whose variants are told in groups


def evaluate_robustness(
    evaluation: Evaluation, tasks: Sequence[str], data: str | None = None, limit: int | None = None, seed: int = 0
) -> str:
    """Poses the first `limit` items (None: all) of each task in every variant of every study; returns the tables to print.

    Items that have not NUM_CHOICES choices are left out, and those that `seed` draws as examples. Writes `robustness.json`, a PNG a task
    and how each item was answered. Raises UserError for data that is missing or too small, and items longer than the model's context.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}: it must be 1 or more, or left out to ask all items")
    fitting = {task: [item for item in load_items(task, data) if len(item.choices) == NUM_CHOICES] for task in tasks}
    drawn = {task: draw_shots(task, items, seed) for task, items in fitting.items()}  # refused before the model is read, not after
    score = label_scorer(evaluation.model)
    evaluation.check_directory()
    results, tables, pictures = {}, [], []
    for task, (shots, items) in drawn.items():
        found = measure(score, items[:limit], shots)
        evaluation.write_items(f"{task} robustness", found.pop("items"))
        results[task] = found
        tables.append(table(task, found))
        pictures.append(evaluation.directory / f"robustness-{quote(task, safe='')}.png")
    settings = {"tasks": list(results), "data": data, "limit": limit, "seed": seed, "num_shots": NUM_SHOTS}
    written = [evaluation.write("robustness", settings, results), *pictures]
    for picture, (task, found) in zip(pictures, results.items()):
        draw(picture, task, found)
    return "\n\n".join([*tables, f"written: {', '.join(map(str, written))}"])


def label_scorer(model: Model) -> Score:
    """Returns what scores labels by their log-likelihoods under a model. A beginning that prompts share, such as the examples, is computed once.

    Raises UserError for a model without a tokenizer, and of each prompt that is too long for it.
    """
    scorer, tokenizer = ContinuationScorer(model.llama, model.layout, model.dtype), model.text_tokenizer()

    def score(prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> list[list[float]]:
        encode = functools.cache(tokenizer.encode_continuation)
        contexts = [tokenizer.encode(prompt, bos=tokenizer.adds_bos) for prompt in prompts]
        requests = [(context, encode(each)) for context, of_context in zip(contexts, continuations, strict=True) for each in of_context]
        longest = max(len(context) + len(continuation) for context, continuation in requests)
        if model.context_length is not None and longest > model.context_length:
            raise UserError(
                f"a prompt with its examples has {longest} tokens, and the model's context holds {model.context_length}: "
                "draw other examples with --seed, or give shorter items"
            )
        found = iter([each.log_likelihood for _, each in sorted(scorer.score(model.params, requests))])
        return [[next(found) for _ in of_context] for of_context in continuations]

    return score


def measure(score: Score, items: Sequence[Item], shots: dict[str, list[Item]]) -> dict:
    """Runs all studies of a task: {"num_items", "studies": {name: ...}, "items": rows}, where an item's score is the mean over all variants."""
    answers_N = np.array([item.answer for item in items])
    picks, measured = {}, {}
    for study, variants in studies().items():
        for variant in variants:
            key = dataclasses.replace(variant, name="")  # the usual way of asking stands in three studies
            if key not in picks:
                picks[key] = ask(score, items, shots, variant)
        picks_VN = np.stack([picks[dataclasses.replace(variant, name="")] for variant in variants])
        measured[study] = compare(variants, picks_VN, answers_N)
    picks_VN = np.stack(list(picks.values()))
    scores_N, kinds_N = (picks_VN == answers_N).mean(0), [np.unique(picks_N) for picks_N in picks_VN.T]
    rows = [{"id": item.id, "score": score, "choices": kinds} for item, score, kinds in zip(items, scores_N, kinds_N)]
    return {"num_items": len(items), "studies": measured, "items": rows}


def ask(score: Score, items: Sequence[Item], shots: dict[str, list[Item]], variant: Variant) -> np.ndarray:
    """Returns the choice [N] that the model picks of each item: an index into the item's own choices, wherever they stand."""
    prompts = [variant.prompt(item, shots[item.subject]) for item in items]
    scores_NC = np.asarray(score(prompts, [[f" {label}" for label in variant.labels]] * len(items)))
    assert scores_NC.shape == (len(items), NUM_CHOICES), scores_NC.shape
    return np.argsort(variant.order)[scores_NC.argmax(1)]


def compare(variants: Sequence[Variant], picks_VN: np.ndarray, answers_N: np.ndarray) -> dict:
    """Returns the numbers of one study: each variant's accuracy with its 95 % interval, the share of its items that flip (another choice than
    in the first variant) and how often each place is picked; then the spread over the variants, and the share of items that no variant flips."""
    accuracy_V, flips_VN, N = (picks_VN == answers_N).mean(1), picks_VN != picks_VN[0], len(answers_N)
    rows = []
    for variant, picks_N, accuracy, flips_N in zip(variants, picks_VN, accuracy_V, flips_VN):
        places = np.bincount(np.array(variant.order)[picks_N], minlength=NUM_CHOICES) / N
        numbers = {"accuracy": accuracy, "half_interval": half_interval(accuracy, N), "flips": flips_N.mean(), "places": places}
        rows.append({"name": variant.name, "distance": distance(variant.order), **numbers})
    spread = {"mean": accuracy_V.mean(), "spread": np.ptp(accuracy_V), "standard_deviation": accuracy_V.std()}
    return {"variants": rows, **spread, "unchanged": 1 - flips_VN.any(0).mean()}


def table(task: str, found: dict) -> str:
    """Returns the studies as text; the orders of the answers by how many choices they move."""
    lines = [f"{task}: {found['num_items']} items, {NUM_SHOTS} examples (few-shot labels: 4)"]
    for study, result in found["studies"].items():
        lines.append(f"\n{study:24} accuracy (95 %)     flips   places {' / '.join(letters(range(NUM_CHOICES)))} picked, %")
        for name, rows in _told(study, result["variants"]):
            mean = lambda key: np.mean([row[key] for row in rows], axis=0)
            places = " / ".join(f"{100 * share:.0f}" for share in mean("places"))
            lines.append(f"  {name:22} {mean('accuracy'):7.1%} ± {mean('half_interval'):6.1%} {mean('flips'):8.1%}   {places}")
        lines.append(
            f"  {'spread (max - min)':22} {result['spread']:7.1%}, standard deviation {result['standard_deviation']:.1%}; "
            f"{result['unchanged']:.1%} of the items answered alike throughout"
        )
    return "\n".join(lines)


def draw(path: Path, task: str, found: dict) -> None:
    """Draws a panel for each study: the accuracy of each variant with its 95 % interval, chance as a line. Raises UserError without
    matplotlib."""
    with figure_file(path, 12, 3.6) as figure:
        panels = figure.subplots(1, len(found["studies"]), sharey=True)
        for panel, (study, result) in zip(panels, found["studies"].items()):
            told = _told(study, result["variants"])
            for x, (_, rows) in enumerate(told):
                xs = x + np.linspace(-0.3, 0.3, len(rows)) if len(rows) > 1 else [x]
                accuracy, half = ([100 * row[key] for row in rows] for key in ("accuracy", "half_interval"))
                panel.errorbar(xs, accuracy, yerr=half, fmt="o", markersize=4, linewidth=0.8, color="tab:blue")
            panel.axhline(100 / NUM_CHOICES, color="gray", linewidth=0.8, linestyle=":")
            names = [name.removeprefix("distance ") for name, _ in told]
            panel.set_xticks(range(len(told)), names, rotation=0 if study == ORDER else 35, ha="center" if study == ORDER else "right")
            panel.set_title(f"{study}: spread {100 * result['spread']:.1f}", fontsize=10)
            panel.set_xlabel("choices moved" if study == ORDER else "")
        panels[0].set_ylabel(f"{task} accuracy, %")


def _told(study: str, rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """Returns the named lines of the table, and the variants that each is the mean of."""
    if study != ORDER:
        return [(row["name"], [row]) for row in rows]
    distances = dict.fromkeys(row["distance"] for row in rows)
    return [(f"distance {moved}", [row for row in rows if row["distance"] == moved]) for moved in distances]
