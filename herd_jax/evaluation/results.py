"""What a command of the evaluation found, on disk: `DIR/COMMAND.json` for its numbers, `DIR/items/TASK.jsonl` for one line an item.

A file appears whole or not at all. `compare` and `contamination` join the items of two directories by their ids.
"""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from herd_jax.errors import UserError
from herd_jax.files import user_path, write_whole

VERSION = 1
OF_SEVERAL = ("compare", "contamination")  # commands whose results are of several models, and may lie beside those of one
_KEYS = {"command", "model", "version", "settings", "results"}


def check_writable(directory: Path) -> None:
    """Makes the directory where there is none: called before hours of computing. Raises UserError where no file can be written into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}): give an --output that can be") from error


def short_names(directories: Sequence[str | Path]) -> list[str]:
    """Returns a name for each directory: its last part, or all of it where that of another is the same."""
    names = [user_path(directory).resolve().name for directory in directories]
    return [name if names.count(name) == 1 else str(directory) for name, directory in zip(names, directories, strict=True)]


def item_id(*texts: str) -> str:
    """Returns the id of an item: 16 hexadecimal digits of the hash of its texts (question, choices, ...), the same on every machine."""
    return sha256("\x1f".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def half_interval(score: float, num_items: int) -> float:
    """Returns half of the 95 % interval of a mean of 0/1 scores, 1.96 sqrt(S (1 - S) / N) (section 5.1 of the paper); `score` in [0, 1]."""
    return 1.96 * math.sqrt(score * (1 - score) / num_items)


def write_results(
    directory: str | Path, command: str, model: str | Path, settings: Mapping[str, Any], results: Mapping[str, Any]
) -> Path:
    """Writes `DIRECTORY/COMMAND.json` and returns its path. Arrays become lists, and what is no finite number null.

    Raises UserError where the directory cannot be written.
    """
    record = {"command": command, "model": str(model), "version": VERSION, "settings": dict(settings), "results": dict(results)}
    text = json.dumps(_plain(record), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return write_whole(user_path(directory) / f"{command}.json", text + "\n")


def write_items(directory: str | Path, task: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes `DIRECTORY/items/TASK.jsonl` and returns its path: of each row "id" (see `item_id`), "score" and whatever else it has.

    The second row of an id gets the id `ID-2`, so that a task with two items of one text keeps both.
    Raises UserError where the directory cannot be written.
    """
    seen: Counter[str] = Counter()
    lines = []
    for row in rows:
        assert {"id", "score"} <= row.keys(), row.keys()
        seen[row["id"]] += 1
        number = seen[row["id"]]
        row = dict(row) | {"id": row["id"] if number == 1 else f"{row['id']}-{number}"}
        lines.append(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")
    return write_whole(_items_file(directory, task), "".join(lines))


def read_results(directory: str | Path) -> dict[str, dict[str, Any]]:
    """Returns the records of `write_results` by command, in alphabetical order; empty where the directory holds none.

    Raises UserError where there is no such directory or a file in it is damaged or of another version.
    """
    records = {}
    for file in sorted(_existing(directory).glob("*.json")):
        record = _parse(file, file.read_bytes())
        if isinstance(record, dict) and _KEYS <= record.keys():
            if record["version"] != VERSION:
                raise UserError(f"{file} has version {record['version']} where {VERSION} is read: evaluate the model again")
            records[record["command"]] = record
    return records


def read_items(directory: str | Path, task: str) -> dict[str, dict[str, Any]]:
    """Returns the rows of a task by id, in their order. Raises UserError where they are missing or damaged."""
    file = _items_file(directory, task)
    if not file.is_file():
        has = ", ".join(item_tasks(directory)) or "none"
        raise UserError(f"{file} does not exist, {directory} has items of {has}: evaluate the model on {task}")
    with file.open("rb") as lines:
        rows = [_parse(file, line) for line in lines]
    if not all(isinstance(row, dict) and "id" in row for row in rows):
        raise UserError(f"{file} has a line without an id: evaluate the model again")
    return {row["id"]: row for row in rows}


def item_tasks(directory: str | Path) -> list[str]:
    """Returns the tasks whose items the directory has, in alphabetical order. Raises UserError where there is no such directory."""
    return sorted(unquote(file.stem) for file in (_existing(directory) / "items").glob("*.jsonl"))


def _items_file(directory: str | Path, task: str) -> Path:
    return user_path(directory) / "items" / f"{quote(task, safe=' ')}.jsonl"  # a task may be named with a slash


def _existing(directory: str | Path) -> Path:
    if not user_path(directory).is_dir():
        raise UserError(f"{directory} is no directory: give one that python -m herd_jax.evaluate wrote")
    return user_path(directory)


def _parse(file: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is damaged: remove it and evaluate the model again") from error


def _plain(value: Any) -> Any:
    """Returns the value in JSON's own types."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case _:
            return str(value)
