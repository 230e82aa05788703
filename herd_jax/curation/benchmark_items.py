"""Items of benchmarks, read from files as texts. What is looked for in them is in `decontamination.py`."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from herd_jax.errors import UserError
from herd_jax.files import user_path


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A file of items: `.jsonl`, `.json` (a list of objects), `.parquet`, or text with one item a line.

    An item is the text of its `fields` one after another, of lists and objects in them all texts; without `fields` it is all of them.
    """

    name: str  # letters, digits and underscores
    path: str  # .jsonl, .json, .parquet, or text with an item a line
    fields: tuple[str, ...] = ()  # whose text is the item; none named: all

    def __post_init__(self):
        if not re.fullmatch(r"\w+", self.name, re.ASCII):
            raise UserError(f"curation benchmarks has one of the name '{self.name}': use letters, digits and underscores")


def read_items(benchmark: Benchmark) -> Iterator[str]:
    """Yields the text of each item; raises UserError for a file that cannot be read or has no items, or an item without one of the fields."""
    path, number = user_path(benchmark.path), 0
    try:
        for number, record in enumerate(_records(path), start=1):
            yield record if isinstance(record, str) else _text(record, benchmark, number)
    except (OSError, ValueError) as error:  # json's and pyarrow's errors are among them
        if isinstance(error, UserError):
            raise
        raise UserError(f"benchmark {benchmark.name} cannot be read from {path} ({_brief(error)}): give a whole file") from error
    if not number:
        raise UserError(f"benchmark {benchmark.name} has no items in {benchmark.path}: give the path of a file that has some")


def _records(path: Path) -> Iterator[str | dict]:
    match path.suffix:
        case ".parquet":
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        case ".json":
            yield from json.loads(path.read_bytes())
        case suffix:
            with path.open(encoding="utf-8", errors="replace") as lines:
                yield from (json.loads(line) if suffix == ".jsonl" else line for line in lines if line.strip())


def _text(record: dict, benchmark: Benchmark, number: int) -> str:
    if not isinstance(record, dict):
        raise UserError(f"benchmark {benchmark.name}: item {number} of {benchmark.path} is no object: write each as one")
    for field in benchmark.fields:
        if field not in record:
            has = ", ".join(record)
            raise UserError(f"benchmark {benchmark.name}: item {number} of {benchmark.path} has no field '{field}': it has {has}")
    return "\n".join(text for field in benchmark.fields or record for text in _leaves(record[field]))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif value is not None:
        yield str(value)


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
