"""Source files as documents: `.jsonl`, `.jsonl.gz` and `.parquet` hold many, any other text file is one.

What becomes of the documents is not here.
"""

import dataclasses
import glob
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from herd_jax.errors import UserError

UNIT_BYTES = (2**20, 2**26)  # least and most source bytes in a unit of work
NUM_UNITS = 512  # aimed at between those limits


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a source file: bytes `[start, stop)` of a `.jsonl`, row group `start` of a `.parquet`, else all of it."""

    path: Path
    start: int
    stop: int
    num_bytes: int  # of the source file, for progress


def find_files(sources: Sequence[str], leave_out: Path) -> list[Path]:
    """The files that globs, files and directories (everything below) name: sorted, each once, not hidden, not under `leave_out`.

    Raises UserError where a source names no file.
    """
    found: dict[str, Path] = {}
    for source in sources:
        pattern = os.path.expanduser(source)
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "**")
        elif os.path.exists(pattern):
            pattern = glob.escape(pattern)
        names = sorted(filter(os.path.isfile, glob.iglob(pattern, recursive=True)))
        files = {os.path.realpath(name): Path(name) for name in names}
        if not files:
            raise UserError(f"source {source} matches no files: name files, directories or quoted globs such as 'texts/**/*.txt'")
        found = files | found
    inside = os.path.realpath(leave_out) + os.sep
    return sorted(path for real, path in found.items() if not real.startswith(inside))


def work_units(files: Sequence[Path]) -> list[list[Piece]]:
    """Groups files, and cuts large ones, into units of about equal size; depends on the files alone."""
    sizes = [os.path.getsize(file) for file in files]
    unit_bytes = min(max(sum(sizes) // NUM_UNITS, UNIT_BYTES[0]), UNIT_BYTES[1])
    units: list[list[Piece]] = []
    filled = unit_bytes
    for file, size in zip(files, sizes, strict=True):
        for piece in _pieces(file, size, unit_bytes):
            if filled >= unit_bytes:
                units.append([])
                filled = 0
            units[-1].append(piece)
            filled += piece.num_bytes
    return units


def read_documents(piece: Piece, text_field: str, skipped: Counter[str]) -> Iterator[str]:
    """The texts of a piece that are not blank; what had to be left out is counted in `skipped` under its reason."""
    try:
        for text in _texts(piece, text_field, skipped):
            if text.strip():
                yield text
            else:
                skipped["empty documents"] += 1
    except UnicodeError:
        skipped["files that are not UTF-8 text"] += 1
    except (OSError, EOFError, zlib.error):
        skipped["files that could not be read to their end"] += 1


def _pieces(file: Path, size: int, unit_bytes: int) -> list[Piece]:
    match _kind(file):
        case "jsonl":
            starts = range(0, size, unit_bytes)
            return [Piece(file, start, min(start + unit_bytes, size), min(unit_bytes, size - start)) for start in starts]
        case "parquet":
            num_groups = _num_row_groups(file)
            return [Piece(file, group, group + 1, size // num_groups) for group in range(num_groups)]
        case _:
            return [Piece(file, 0, size, size)]


def _texts(piece: Piece, text_field: str, skipped: Counter[str]) -> Iterator[str]:
    match _kind(piece.path):
        case "jsonl":
            with piece.path.open("rb") as file:
                # A line belongs to the piece in which its first byte lies.
                if piece.start:
                    file.seek(piece.start - 1)
                    file.readline()
                while file.tell() < piece.stop:
                    yield from _line_text(file.readline(), text_field, skipped)
        case "jsonl.gz":
            with gzip.open(piece.path, "rb") as file:
                for line in file:
                    yield from _line_text(line, text_field, skipped)
        case "parquet":
            yield from _row_texts(piece, text_field, skipped)
        case _:
            content = piece.path.read_bytes()
            if b"\0" in content:
                skipped["files that are not UTF-8 text"] += 1
            else:
                yield content.decode("utf-8-sig")


def _line_text(line: bytes, text_field: str, skipped: Counter[str]) -> Iterator[str]:
    if not line.strip():
        return
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        skipped["lines that are not JSON"] += 1
        return
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str) or not _is_unicode(text):
        skipped[f"lines without a text in field {text_field!r}"] += 1
        return
    yield text


def _row_texts(piece: Piece, text_field: str, skipped: Counter[str]) -> Iterator[str]:
    pyarrow = _import_parquet()
    try:
        file = pyarrow.parquet.ParquetFile(piece.path)
        if text_field not in file.schema_arrow.names:
            skipped[f"row groups without a column {text_field!r}"] += 1
            return
        for batch in file.iter_batches(batch_size=1024, row_groups=[piece.start], columns=[text_field]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str):
                    yield text
                else:
                    skipped[f"rows without a text in column {text_field!r}"] += 1
    except pyarrow.ArrowException:
        skipped["files that could not be read to their end"] += 1


def _num_row_groups(file: Path) -> int:
    pyarrow = _import_parquet()
    try:
        return max(pyarrow.parquet.ParquetFile(file).num_row_groups, 1)
    except (pyarrow.ArrowException, OSError):
        return 1  # reading it will count it as skipped


def _import_parquet() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading .parquet needs the package pyarrow: pip install 'herd-jax[parquet]'") from error
    return pyarrow


def _kind(file: Path) -> str:
    name = file.name.lower()
    return next((kind for kind in ("jsonl", "jsonl.gz", "parquet") if name.endswith(f".{kind}")), "text")


def _is_unicode(text: str) -> bool:
    """False for the lone surrogates that JSON escapes can spell but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
