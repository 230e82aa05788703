"""Source files as documents: `.jsonl` (also `.gz`, `.zst`) and `.parquet` hold many, any other text file is one."""

import dataclasses
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from herd_jax.errors import UserError
from herd_jax.files import user_path

UNIT_BYTES = (2**20, 2**26)  # least and most source bytes in a unit of work
NUM_UNITS = 512  # the number of units to make, as far as those limits allow
BATCH_BYTES = 2**24  # of the rows of a `.parquet` that are in memory at once, if all are as long as their mean
TOO_LONG = "documents that are too long"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # such as a cut emoji, which JSON escapes can spell but UTF-8 cannot


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a source file: bytes `[start, stop)` of a `.jsonl`, row group `start` of a `.parquet`, else all of it."""

    path: Path
    start: int
    stop: int
    num_bytes: int  # of the source file, for progress


def find_files(sources: Sequence[str], leave_out: Path) -> list[Path]:
    """Returns the files that globs, files and directories (everything below) name: sorted, each once, not hidden, not under `leave_out`.

    Raises UserError where a source names no file.
    """
    found: dict[str, Path] = {}
    for source in sources:
        pattern = str(user_path(source))
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
    """Yields the texts of a piece that are not blank; what had to be left out is counted in `skipped` under its reason."""
    if holds_rows(piece.path):
        texts = (row[text_field] for _, row in read_rows(piece, text_field, (), skipped))
    else:
        texts = _file_text(piece.path, skipped)
    for text in texts:
        if text.strip():
            yield text
        else:
            skipped["empty documents"] += 1


def holds_rows(file: Path) -> bool:
    """Returns whether a file is of a format that holds many documents, as rows with fields."""
    return _kind(file) != "text"


def read_rows(
    piece: Piece, text_field: str, other_fields: Sequence[str], skipped: Counter[str], max_bytes: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (position in the file, fields) of the rows of a piece that have a text; what had to be left out is counted in `skipped`.

    The position is the first byte of a line (of the decompressed file), or the number of a row. Of a `.parquet` only `text_field` and what
    it has of `other_fields` are read. Rows of more than `max_bytes` are left out; lines among them are never in memory as a whole.
    """
    try:
        if _kind(piece.path) == "parquet":
            yield from _parquet_rows(piece, text_field, other_fields, skipped, max_bytes)
        else:
            with _open_lines(piece.path) as file:
                yield from _json_rows(file, piece, text_field, skipped, max_bytes)
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


def _file_text(path: Path, skipped: Counter[str]) -> Iterator[str]:
    try:
        content = path.read_bytes()
        if b"\0" in content:
            skipped["files that are not UTF-8 text"] += 1
        else:
            yield content.decode("utf-8-sig")
    except UnicodeError:
        skipped["files that are not UTF-8 text"] += 1
    except OSError:
        skipped["files that could not be read to their end"] += 1


def _open_lines(path: Path) -> BinaryIO:
    match _kind(path):
        case "jsonl.gz":
            return gzip.open(path, "rb")
        case "jsonl.zst":
            return io.BufferedReader(_import_parquet().input_stream(str(path), compression="zstd"), 2**20)
        case _:
            return path.open("rb")


def _json_rows(
    file: BinaryIO, piece: Piece, text_field: str, skipped: Counter[str], max_bytes: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    is_cut = _kind(piece.path) == "jsonl"
    position = 0
    if is_cut and piece.start:  # a line belongs to the piece in which its first byte lies
        file.seek(piece.start - 1)
        position = piece.start - 1 + sum(map(len, _rest_of_line(file)))
    while not is_cut or position < piece.stop:
        line = file.readline(-1 if max_bytes is None else max_bytes)
        if not line:
            return
        start, position = position, position + len(line)
        if len(line) == max_bytes and not line.endswith(b"\n"):
            position += sum(map(len, _rest_of_line(file)))
            skipped[TOO_LONG] += 1
        elif line.strip() and (row := _json_row(line, text_field, skipped)):
            yield start, row


def _rest_of_line(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.readline(2**20):
        yield chunk
        if chunk.endswith(b"\n"):
            return


def _json_row(line: bytes, text_field: str, skipped: Counter[str]) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        skipped["lines that are not JSON"] += 1
        return None
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        skipped[f"lines without a text in field {text_field!r}"] += 1
        return None
    return row | {text_field: _LONE_SURROGATE.sub("\ufffd", text)}


def _parquet_rows(
    piece: Piece, text_field: str, other_fields: Sequence[str], skipped: Counter[str], max_bytes: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    pyarrow = _import_parquet()
    try:
        file = pyarrow.parquet.ParquetFile(piece.path, buffer_size=2**20)
        if text_field not in file.schema_arrow.names:
            skipped[f"row groups without a column {text_field!r}"] += 1
            return
        position = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        group = file.metadata.row_group(piece.start)
        mean_bytes = group.total_byte_size // max(group.num_rows, 1)
        columns = [text_field, *(name for name in other_fields if name in file.schema_arrow.names)]
        batches = file.iter_batches(min(max(BATCH_BYTES // max(mean_bytes, 1), 1), 1024), row_groups=[piece.start], columns=columns)
        for batch in batches:
            for index, row in enumerate(batch.to_pylist()):
                text = row[text_field]
                if not isinstance(text, str):
                    skipped[f"rows without a text in column {text_field!r}"] += 1
                elif max_bytes is not None and len(text) > max_bytes:
                    skipped[TOO_LONG] += 1
                else:
                    yield position + index, row
            position += batch.num_rows
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
        raise UserError("reading .parquet and .zst needs the package pyarrow: pip install 'herd-jax[parquet]'") from error
    return pyarrow


def _kind(file: Path) -> str:
    name = file.name.lower()
    return next((kind for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet") if name.endswith(f".{kind}")), "text")
