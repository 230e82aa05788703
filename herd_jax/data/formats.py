"""The format of a source file, seen in its bytes: its name decides only where they leave it open."""

import bz2
import dataclasses
import functools
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal

from herd_jax.errors import UserError

HEAD_BYTES = 2**18
_COMPRESSIONS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
_WARC_COMPRESSIONS = ("", "gz", "zst")
_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Format:
    """`lines`: a JSON object a line; `list`: one JSON list, or one object, over any lines; `compression` is none for "parquet"."""

    kind: Literal["lines", "list", "parquet", "warc", "text"]
    compression: Literal["", "gz", "zst", "bz2", "xz"] = ""

    @property
    def holds_rows(self) -> bool:
        """Returns whether it holds many documents, as rows with fields."""
        return self.kind in ("lines", "list", "parquet")


def find_format(path: Path) -> Format:
    """Returns the format of a file; "text" where it cannot be read, or its bytes are of no format that is known."""
    try:
        status = os.stat(path)
        return _find_format(path, status.st_size, status.st_mtime_ns)
    except OSError:
        return Format("text")


@functools.lru_cache(maxsize=2**16)
def _find_format(path: Path, *_) -> Format:
    with path.open("rb") as file:
        start = file.read(HEAD_BYTES)
    compression = next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), "")
    name, ending = path.name.lower(), path.suffix.lower().removeprefix(".")
    if ending in _COMPRESSIONS.values():
        name = name.removesuffix(f".{ending}")
        compression = compression or (ending if b"\0" in start else "")  # its beginning is damaged
    if start.startswith(b"PAR1") or not compression and name.endswith(".parquet"):
        return Format("parquet")
    head = start
    if compression:
        try:
            with open_format(path, compression) as file:
                head = file.read(HEAD_BYTES)
        except UserError:
            raise
        except Exception:  # of any of the libraries: it is damaged, which reading it will say
            head = b""
    if compression in _WARC_COMPRESSIONS and (head.startswith(b"WARC/") or name.endswith((".warc", ".wet"))):
        return Format("warc", compression)
    return Format(_kind(head, name), compression)


def _kind(head: bytes, name: str) -> str:
    """Returns the kind of a file that begins with `head` and has this name without the ending of a compression."""
    head, is_named = head.removeprefix(_MARK).lstrip(), name.endswith(_LINES)
    if head.startswith(b"{"):
        first, *others = head.split(b"\n", 2)[:2]
        if _begins_with_object(first):
            return "lines" if is_named or any(map(_begins_with_object, others)) else "text"
        return "list" if name.endswith(".json") else "lines" if is_named else "text"
    if head.startswith(b"[") and head[1:].lstrip().startswith((b"{", b"]")) and (is_named or _begins_with_object(head[1:].lstrip())):
        return "list"
    return "lines" if is_named else "text"


def _begins_with_object(content: bytes) -> bool:
    try:
        return isinstance(json.JSONDecoder().raw_decode(content.decode("utf-8", "replace"))[0], dict)
    except (ValueError, RecursionError):
        return False


def open_format(path: Path, compression: str) -> BinaryIO:
    """Opens a file to read what was compressed."""
    match compression:
        case "gz":
            return gzip.open(path, "rb")
        case "bz2":
            return bz2.open(path, "rb")
        case "xz":
            return lzma.open(path, "rb")
        case "zst":
            return io.BufferedReader(import_parquet().input_stream(str(path), compression="zstd"), 2**20)
        case _:
            return path.open("rb")


def import_parquet() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading .parquet and .zst needs the package pyarrow: pip install 'herd-jax[parquet]'") from error
    return pyarrow
