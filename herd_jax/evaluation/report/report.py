"""One page, and one JSON file, of all that is known of a model, or of several side by side."""

import dataclasses
import json
from collections.abc import Sequence

from herd_jax.evaluation.report.data import EvaluationReport, collect
from herd_jax.evaluation.report.page import benchmark_rows, page
from herd_jax.files import user_path, write_whole


def report(directories: Sequence[str], output: str | None = None) -> str:
    """Writes `report.html` and `report.json` into `output` (default: the directory, where it is one, else evaluation/report).

    A directory is what the other commands wrote of a model, or of several (`contamination`, `compare`), or the workdir of a training run.
    Raises UserError where one of them is missing, damaged or empty.
    """
    found = collect(directories)
    target = user_path(output or (directories[0] if len(directories) == 1 else "evaluation/report"))
    files = [
        write_whole(target / "report.html", page(found)),
        write_whole(target / "report.json", json.dumps(to_dict(found), indent=1, ensure_ascii=False) + "\n"),
    ]
    return "\n".join(f"written: {file}" for file in files)


def to_dict(report: EvaluationReport) -> dict:
    """Returns the report for JSON, with the main metric of each benchmark."""
    values = dataclasses.asdict(report)
    for model, written in zip(report.models, values["models"], strict=True):
        written["benchmarks"] = benchmark_rows(model)
    return values
