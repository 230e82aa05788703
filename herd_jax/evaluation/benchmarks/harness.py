"""Runs tasks through lm-evaluation-harness: offline, each answer kept as it comes, the harness's table with 95 % intervals."""

import os

for _library in ("HF_HUB", "HF_DATASETS", "HF_EVALUATE", "TRANSFORMERS"):  # read when the harness is imported
    os.environ.setdefault(f"{_library}_OFFLINE", "1")

import contextlib  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import sqlite3  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest import mock  # noqa: E402

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import make_table  # noqa: E402

from herd_jax.errors import UserError  # noqa: E402
from herd_jax.evaluation.benchmarks.harness_model import HarnessModel  # noqa: E402
from herd_jax.evaluation.benchmarks.local_tasks import NAMES, PRESETS, local_task  # noqa: E402
from herd_jax.evaluation.benchmarks.task_data import check_directory  # noqa: E402
from herd_jax.evaluation.evaluation import Evaluation  # noqa: E402
from herd_jax.evaluation.results import check_writable, half_interval, item_id  # noqa: E402
from herd_jax.model import Model  # noqa: E402

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant


def run(
    evaluation: Evaluation, tasks: Sequence[str], data: str | None = None, limit: int | None = None, *,
    batch_size: int = 16, chats: bool = False, preset: str | None = None, unsafe_execution: bool = False,
) -> str:  # fmt: skip
    """Evaluates the model on `tasks`; writes `run.json`, the items and the cache of answers, and returns the table to print.

    `limit`: items of each task, the first ones. `chats`: prompts in the chat format. `preset`: of the tasks' settings, "instruct" (the
    model writes its answer) or "base" (the likeliest choice); by default as `chats` says. `unsafe_execution`: code that the model wrote runs also where
    the machine cannot contain it. A run that was ended continues from its cache.
    Raises UserError for tasks without data, and what `load` and `evaluate` raise.
    """
    preset = preset or ("instruct" if chats else "base")
    if preset not in PRESETS:
        raise UserError(f"--preset is '{preset}': it must be one of {', '.join(PRESETS)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}: it must be 1 or more")
    found = find_tasks(tasks, preset, data, unsafe_execution)
    model = evaluation.model
    evaluation.check_directory()
    results = evaluate(model, found, evaluation.directory / "cache", limit, batch_size, chats)
    for task, samples in results["samples"].items():
        evaluation.write_items(task, map(_item, _first_filter(samples)))
    summary = {task: _summary(task, results) for task in results["results"]}
    settings = {"tasks": list(tasks), "data": data, "limit": limit, "chat": chats, "preset": preset, "dtype": str(model.dtype.__name__)}
    written = evaluation.write("run", settings, summary)
    return f"{make_table(results)}\n{_intervals(summary)}\nwritten: {written}"


def evaluate(model: Model, tasks: Sequence, cache: Path, limit: int | None = None, batch_size: int = 16, chats: bool = False) -> dict:
    """Returns what the harness finds of `tasks` (its own task objects), answers kept in `cache`, in one file for each content of the model.

    Raises UserError for a model without a tokenizer, or without a chat format where `chats`, and a cache that is damaged.
    """
    if chats and model.tokenizer is not None:
        from herd_jax.text import chat

        chat.render([{"role": "user", "content": "?"}], model.tokenizer, add_assistant_header=True)
    harness_model = HarnessModel(model, batch_size, chats)
    check_writable(cache)
    kept = cache / harness_model.fingerprint
    _check_kept(kept)
    with mock.patch("lm_eval.evaluator.get_git_commit_hash", lambda: None):  # else git complains wherever there is no repository
        results = simple_evaluate(
            harness_model, tasks=list(tasks), limit=limit, use_cache=str(kept), apply_chat_template=chats,
            task_manager=TaskManager(include_defaults=False), bootstrap_iters=1000,
        )  # fmt: skip
    if harness_model.num_cut:
        print(
            f"warning: {harness_model.num_cut} prompts are longer than the model's context of {harness_model.max_length} tokens and lost their "
            "beginning: evaluate a model of a longer context, or read these scores as those of shortened prompts", file=sys.stderr,
        )  # fmt: skip
    return results


def _check_kept(kept: Path) -> None:
    """Refuses a damaged file of answers: the harness would find a damaged file in a thread of its own, whose traceback nothing stops."""
    for file in kept.parent.glob(f"{kept.name}*.db"):
        try:
            with contextlib.closing(sqlite3.connect(file)) as answers:
                (found,) = answers.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            found = str(error)
        if found != "ok":
            raise UserError(f"{file}, the answers so far, is damaged ({found.splitlines()[-1]}): remove it and start again")


def find_tasks(names: Sequence[str], preset: str, data: str | None, unsafe_execution: bool = False) -> list:
    """Returns our tasks where there are such, else the harness's own, whose data must be in the cache of Hugging Face.

    Raises UserError where there is no such task or its data is not on disk.
    """
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--tasks names {min(repeated)} twice: name each once")
    if data is not None:
        check_directory(data)
    found = {name: local_task(name, preset, data, unsafe_execution) for name in names}
    others = [name for name in names if found[name] is None]
    if not others:
        return list(found.values())
    manager = TaskManager()
    if unknown := [name for name in others if name not in manager.all_tasks]:
        ours = ", ".join(NAMES)
        raise UserError(f"there is no task {unknown[0]}: there are {ours}, those of lm-eval, and NAME.jsonl of multiple choice in --data")
    for name in others:
        try:
            found[name] = manager.load([name])["tasks"].values()
        except Exception as error:  # what a library raises that may not download is not one thing
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
            raise UserError(
                f"task {name} of lm-eval cannot be loaded without a network ({reason}): set HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 to "
                f"have its data downloaded, or take one of {', '.join(NAMES)}"
            ) from error
    return [task for name in names for task in (found[name] if name in others else [found[name]])]


def _first_filter(samples: list[dict]) -> list[dict]:
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _item(sample: dict) -> dict:
    """Returns the row of an item: `score` is its first metric, log-likelihoods are in nats."""
    doc = sample["doc"]
    metrics = {name: sample[name] for name in sample["metrics"]}
    row = {"id": doc.get("id") or item_id(sample["doc_hash"]), "score": next(iter(metrics.values()))}
    row |= {"metrics": metrics, "target": sample["target"]}
    answers = sample["filtered_resps"]
    if isinstance(answers[0], str):
        return row | {"answer": answers[0]}
    return row | {"log_likelihoods": [answer[0] if isinstance(answer, tuple | list) else answer for answer in answers]}


def _summary(task: str, results: dict) -> dict:
    """Returns, for each metric, its value, the harness's standard error, and half of the 95 % interval where it is a share of items."""
    of_task, num_items = results["results"][task], results["n-samples"].get(task, {}).get("effective")
    metrics = {}
    for key, value in of_task.items():
        name = key.partition(",")[0]
        if "," not in key or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = of_task.get(key.replace(name, f"{name}_stderr", 1))
        is_share = num_items and 0 <= value <= 1 and "perplexity" not in name and not name.startswith("bits")
        metrics[name] = {
            "value": value,
            "stderr": stderr if isinstance(stderr, float) and math.isfinite(stderr) else None,
            "interval": half_interval(value, num_items) if is_share else None,
        }
    return {"items": num_items, "shots": results["n-shot"].get(task), "version": results["versions"].get(task), "metrics": metrics}


def _intervals(summary: dict) -> str:
    lines = []
    for task, found in summary.items():
        for name, metric in found["metrics"].items():
            if metric["interval"] is not None:
                value, half = 100 * metric["value"], 100 * metric["interval"]
                lines.append(f"{task} {name}: {value:.1f} ± {half:.1f} % (95 % interval, {found['items']} items)")
    return "\n".join(lines)
