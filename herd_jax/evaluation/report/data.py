"""What is known of models, joined for a report: results of all commands, validation losses of their training, decisions of its gates."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from herd_jax.errors import UserError
from herd_jax.evaluation.results import OF_SEVERAL, read_results, short_names
from herd_jax.files import user_path
from herd_jax.reliability.workdir import DECISIONS, METRICS

VALIDATION = ("val_loss", "val_bits_per_byte")


@dataclasses.dataclass(frozen=True)
class ModelRecords:
    """What is known of a model. `records`: by command, as `read_results` has them. `validation`: of each stage of its training (of the only
    one, "") the logged steps with validation losses. `decisions`: lines of the gates' `stages.jsonl`. Both are empty where the model is no
    workdir of a run."""

    name: str
    directory: str
    path: str
    records: dict[str, dict[str, Any]]
    validation: dict[str, list[dict[str, float]]]
    decisions: list[dict[str, Any]]

    @property
    def is_empty(self) -> bool:
        return not (self.records or self.validation or self.decisions)


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    models: list[ModelRecords]
    contamination: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]


def collect(directories: Sequence[str | Path]) -> EvaluationReport:
    """Collects what is known. Each directory is what commands wrote of a model (or of several: `contamination`, `compare`), or the workdir of a
    run.

    Raises UserError where a directory is missing, damaged or holds nothing of the kind.
    """
    report = EvaluationReport([], [], [])
    for directory in directories:
        records = read_results(directory)
        shared = [(found, records.pop(command, None)) for found, command in zip((report.comparisons, report.contamination), OF_SEVERAL)]
        for found, record in shared:
            found += [record] if record else []
        model = _model(user_path(directory), records)
        if not model.is_empty:
            report.models.append(model)
        elif not any(record for _, record in shared):
            raise UserError(f"{directory} holds no results: give one that python -m herd_jax.evaluate wrote, or the workdir of a run")
    names = short_names([model.directory for model in report.models])
    models = [dataclasses.replace(model, name=name) for model, name in zip(report.models, names, strict=True)]
    return dataclasses.replace(report, models=models)


def _model(directory: Path, records: dict[str, dict]) -> ModelRecords:
    paths = sorted({record["model"] for record in records.values()}) or [str(directory)]
    if len(paths) > 1:
        raise UserError(f"{directory} holds results of several models ({', '.join(paths)}): evaluate each with another --output")
    workdir = user_path(paths[0])
    stages = sorted(workdir.glob("stages/*/"), key=_stage_number)
    validation = {"": _validation(workdir)} | {stage.name: _validation(stage) for stage in stages}
    validation = {stage: rows for stage, rows in validation.items() if rows}
    decisions = _lines(workdir / DECISIONS)
    return ModelRecords(directory.resolve().name, str(directory), paths[0], records, validation, decisions)


def _validation(workdir: Path) -> list[dict[str, float]]:
    rows = []
    for line in _lines(workdir / METRICS):
        values = {name: value for name, value in line.items() if name.split("/")[0] in VALIDATION and value is not None}
        rows += [{"step": line["step"], **values}] if values else []
    return rows


def _lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file, none where there is no such file; its last line may be torn by a run that goes on."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path} is damaged in line {number}: bring back a good copy, or move it away") from error
    return found


def _stage_number(stage: Path) -> tuple[int, str]:
    number = stage.name.split("-")[0]
    return int(number) if number.isdecimal() else 0, stage.name
