"""The contamination of benchmarks: how much of each item the training streams hold, and what models gain by it (section 5.1.4)."""

import json
from collections.abc import Sequence

from herd_jax.curation.decontamination import NGRAM
from herd_jax.curation.text import words
from herd_jax.errors import UserError
from herd_jax.evaluation.benchmarks.multiple_choice import load_items
from herd_jax.evaluation.benchmarks.task_data import read_records, read_texts
from herd_jax.evaluation.benchmarks.tasks import asdiv, humaneval
from herd_jax.evaluation.contamination.gain import SHARES, estimate
from herd_jax.evaluation.contamination.scan import scan
from herd_jax.evaluation.results import check_writable, item_id, read_items, short_names, write_results
from herd_jax.files import user_path, write_whole

OUTPUT = "evaluation/contamination"
TEXT_FIELDS = ("text", "prompt")  # of items that are no multiple choice
WRITTEN = {"asdiv": asdiv.config, "humaneval": humaneval.config}


def contamination(
    tasks: Sequence[str], streams: Sequence[str], scores: Sequence[str] = (), data: str | None = None, output: str | None = None, *,
    index: str | None = None, workers: int = 0,
) -> str:  # fmt: skip
    """Writes `contamination.json` and the coverage of each item, `coverage/TASK.jsonl`, into `output`; returns the table to print.

    `tasks` are those of `run`, or names for which `data` holds `NAME.jsonl` with a "text" or "prompt" (and perhaps an "id") of each item.
    `streams`: token streams. `scores`: directories with items of evaluated models, joined by id. `index`: where `scan` keeps what it found.
    An item of fewer than 8 words is one n-gram, found whole or not at all; how many are so short is told, for a few words often stand
    together in other texts as well.
    Raises UserError for data, streams or scores that cannot be read, and for scores of other items.
    """
    if workers < 0:
        raise UserError(f"--workers is {workers}: it must be 1 or more, or 0 for one a core")
    directory = user_path(output or OUTPUT)
    texts = {task: item_texts(task, data) for task in tasks}
    models = dict(zip(short_names(scores), scores, strict=True))
    score = {task: {model: _scores(scored, task, texts[task]) for model, scored in models.items()} for task in tasks}
    check_writable(directory)
    found = scan({task: list(items.values()) for task, items in texts.items()}, streams, index or directory / "index", workers)
    results = {}
    for task in tasks:
        coverage = dict(zip(texts[task], found[task].tolist(), strict=True))
        rows = (json.dumps({"id": each, "coverage": share}) + "\n" for each, share in coverage.items())
        write_whole(directory / "coverage" / f"{task}.jsonl", "".join(rows))
        short = sum(len(words.split(text).folded) < NGRAM for text in texts[task].values())
        results[task] = {"num_short": short} | estimate(coverage, score[task])
    settings = {"streams": list(streams), "scores": models, "data": data}
    path = write_results(directory, "contamination", ", ".join(models), settings, results)
    return f"{table(results, list(models))}\nwritten: {path}"


def item_texts(task: str, data: str | None) -> dict[str, str]:
    """Returns the texts of the items by their ids: of multiple choice the question and the choices, else what is asked."""
    file = (user_path(data) / f"{task}.jsonl") if data else None
    first = next(read_records(file), {}) if file and file.is_file() else {}
    if field := next((field for field in TEXT_FIELDS if field in first), None):
        texts: dict[str, str] = {}
        for record in read_texts(file, (field,)):
            text = texts.setdefault(each := str(record.get("id") or item_id(record[field])), record[field])
            if text != record[field]:
                raise UserError(f"{file} has two items of the id {each}: give each its own")
        return texts
    if task in WRITTEN:
        made = WRITTEN[task](task, "base", data)
        return {row["id"]: row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:") for row in [*made["dev"], *made["test"]]}
    return {item.id: "\n".join([item.question, *item.choices]) for item in load_items(task, data)}


def table(results: dict, models: Sequence[str]) -> str:
    """Returns a table as the paper's: of each task the share of contaminated items and the gain of each model in points, * where it is
    significant."""
    heads = ["task", "items", "coverage", *(f">= {share}" for share in SHARES), "T_D", "contaminated"]
    rows = [[*heads, *(f"gain {model}" for model in models)]]
    for task, found in results.items():
        at = [f"{found['items_at'][share] / found['num_items']:.1%}" for share in SHARES]
        threshold, contaminated = ("-", "-") if found["threshold"] is None else (f"{found['threshold']:g}", f"{found['contaminated']:.1%}")
        gains = [_shown(found["gains"].get(model)) for model in models]
        rows.append([task, f"{found['num_items']:,}", f"{found['mean_coverage']:.1%}", *at, threshold, contaminated, *gains])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    if short := [f"{found['num_short']:,} of {task}" for task, found in results.items() if found["num_short"]]:
        lines.append(f"of fewer than {NGRAM} words, so found whole or not at all: {', '.join(short)}")
    if models:
        lines.append("gain: score of all items less that of the clean ones, in points; *: significant; -: none is, or items are too few")
    return "\n".join(lines)


def _shown(gain: dict | None) -> str:
    return "-" if gain is None else f"{100 * gain['gain']:+.1f}{'*' if gain['is_significant'] else ' '}"


def _scores(directory: str, task: str, texts: dict[str, str]) -> dict[str, float]:
    scores = {row["id"]: row.get("score") for row in read_items(directory, task).values()}
    scores = {each: float(score) for each, score in scores.items() if each in texts and isinstance(score, int | float)}
    if not scores:
        raise UserError(f"items of {task} in {directory} score none of its {len(texts)} texts: evaluate the model on the same data")
    return scores
