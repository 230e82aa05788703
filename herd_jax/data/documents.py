"""Source files as documents: JSON lines, a JSON list (both also compressed) and Parquet hold many, any other text file is one."""

import dataclasses
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from herd_jax.data.formats import find_format, import_parquet, open_format
from herd_jax.errors import UserError

UNIT_BYTES = (2**20, 2**26)  # least and most source bytes in a unit of work
NUM_UNITS = 512  # the number of units to make, as far as those limits allow
BATCH_BYTES = 2**24  # of the rows of a `.parquet` that are in memory at once, if all are as long as their mean
TOO_LONG = "documents that are too long"
_UNREAD = object()
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # such as a cut emoji, which JSON escapes can spell but UTF-8 cannot


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a source file: bytes `[start, stop)` of JSON lines that are not compressed, row group `start` of Parquet, else all of it."""

    path: Path
    start: int
    stop: int
    num_bytes: int  # of the source file, for progress


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
    if find_format(piece.path).holds_rows:
        texts = (row[text_field] for _, row in read_rows(piece, text_field, (), skipped))
    else:
        texts = _file_text(piece.path, skipped)
    for text in texts:
        if text.strip():
            yield text
        else:
            skipped["empty documents"] += 1


def read_rows(
    piece: Piece, text_field: str, other_fields: Sequence[str], skipped: Counter[str], max_bytes: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (position in the file, fields) of the rows of a piece that have a text; what had to be left out is counted in `skipped`.

    The position is the first byte of a line (of the decompressed file), or the number of a row. Of Parquet only `text_field` and what
    it has of `other_fields` are read. Rows of more than `max_bytes` are left out; lines among them are never in memory as a whole.
    """
    format = find_format(piece.path)
    try:
        if format.kind == "parquet":
            yield from _parquet_rows(piece, text_field, other_fields, skipped, max_bytes)
            return
        with open_format(piece.path, format.compression) as file:
            if format.kind == "list":
                yield from _list_rows(file, text_field, skipped, max_bytes)
            else:
                yield from _line_rows(file, piece, not format.compression, text_field, skipped, max_bytes)
    except (UserError, MemoryError):
        raise
    except Exception:  # whatever the library of a format raises for a damaged file: the other files go on
        skipped["files that could not be read to their end"] += 1


def _pieces(file: Path, size: int, unit_bytes: int) -> list[Piece]:
    format = find_format(file)
    match format.kind:
        case "lines" if not format.compression:
            starts = range(0, size, unit_bytes)
            return [Piece(file, start, min(start + unit_bytes, size), min(unit_bytes, size - start)) for start in starts]
        case "parquet":
            num_groups = _num_row_groups(file)
            return [Piece(file, group, group + 1, size // num_groups) for group in range(num_groups)]
        case _:
            return [Piece(file, 0, size, size)]


def _file_text(path: Path, skipped: Counter[str]) -> Iterator[str]:
    try:
        with open_format(path, find_format(path).compression) as file:
            content = file.read()
        if b"\0" in content:
            raise UnicodeError
        text = content.decode("utf-8-sig")
    except UnicodeError:
        skipped["files that are not UTF-8 text"] += 1
    except (UserError, MemoryError):
        raise
    except Exception:  # of the library that decompresses it
        skipped["files that could not be read to their end"] += 1
    else:
        yield text


def _line_rows(
    file: BinaryIO, piece: Piece, is_cut: bool, text_field: str, skipped: Counter[str], max_bytes: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
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
    return _with_text(row, "lines", text_field, skipped)


def _with_text(row: Any, what: str, text_field: str, skipped: Counter[str]) -> dict[str, Any] | None:
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        skipped[f"{what} without a text in field {text_field!r}"] += 1
        return None
    return row | {text_field: _LONE_SURROGATE.sub("\ufffd", text)}


def _list_rows(file: BinaryIO, text_field: str, skipped: Counter[str], max_bytes: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the entries of a JSON list, or of JSON values that follow each other; memory holds one of them."""
    text, decoder = io.TextIOWrapper(file, "utf-8-sig", errors="replace"), json.JSONDecoder()
    buffer, number = text.read(2**20).lstrip().removeprefix("["), 0
    while True:
        buffer = buffer.lstrip(" \t\r\n,")
        try:
            row, end = decoder.raw_decode(buffer)
        except (ValueError, RecursionError):
            more = text.read(max(2**20, len(buffer)))
            if not more:
                if buffer.strip() not in ("", "]"):
                    skipped["entries that are not JSON"] += 1
                return
            if max_bytes is not None and len(buffer) > max_bytes:
                skipped["JSON lists that were read up to an entry that is too long"] += 1
                return
            buffer += more
            continue
        if entry := _with_text(row, "entries", text_field, skipped):
            if max_bytes is not None and end > max_bytes:
                skipped[TOO_LONG] += 1
            else:
                yield number, entry
        buffer, number = buffer[end:], number + 1


def _parquet_rows(
    piece: Piece, text_field: str, other_fields: Sequence[str], skipped: Counter[str], max_bytes: int | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    file = import_parquet().parquet.ParquetFile(piece.path, buffer_size=2**20)
    if piece.start >= file.num_row_groups:  # there is none
        return
    if text_field not in file.schema_arrow.names:
        skipped[f"row groups without a column {text_field!r}"] += 1
        return
    position = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    group = file.metadata.row_group(piece.start)
    mean_bytes = group.total_byte_size // max(group.num_rows, 1)
    other_columns = [name for name in other_fields if name in file.schema_arrow.names and name != text_field]
    columns = [text_field, *other_columns]
    batches = file.iter_batches(min(max(BATCH_BYTES // max(mean_bytes, 1), 1), 1024), row_groups=[piece.start], columns=columns)
    for batch in batches:
        values = {name: _column_values(batch.column(name)) for name in columns}
        for name in other_columns:
            if num_unread := sum(value is _UNREAD for value in values[name]):
                skipped[f"values of column {name!r} that cannot be read"] += num_unread
                values[name] = [None if value is _UNREAD else value for value in values[name]]
        for index, text in enumerate(values[text_field]):
            if not isinstance(text, str):
                reason = f"rows whose column {text_field!r} cannot be read" if text is _UNREAD else f"rows without a text in column {text_field!r}"
                skipped[reason] += 1
            elif max_bytes is not None and len(text) > max_bytes:
                skipped[TOO_LONG] += 1
            else:
                yield position + index, {name: values[name][index] for name in columns}
        position += batch.num_rows


def _column_values(column) -> list:
    """Returns the values of a column; _UNREAD for one that Python does not have, such as a string that is not UTF-8 or a date after the year 9999."""
    try:
        return column.to_pylist()
    except Exception:  # one value is enough for that
        return [_value(cell) for cell in column]


def _value(cell) -> Any:
    try:
        return cell.as_py()
    except Exception:
        return _UNREAD


def _num_row_groups(file: Path) -> int:
    try:
        return max(import_parquet().parquet.ParquetFile(file).num_row_groups, 1)
    except UserError:
        raise
    except Exception:
        return 1  # reading it will say what is wrong with it
