"""Source files as documents with metadata: WARC, HTML, JSONL, Parquet, text and source code, in tasks that depend on the files alone."""

import dataclasses
import datetime
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline

from herd_jax.curation.block import Block, task_file
from herd_jax.curation.input.decoding import decode
from herd_jax.curation.input.warc import read_captures
from herd_jax.curation.web_address import without_fragment
from herd_jax.data.documents import TOO_LONG, Piece, read_rows, work_units
from herd_jax.data.formats import find_format, open_format
from herd_jax.data.source_files import find_files
from herd_jax.errors import UserError
from herd_jax.files import user_path, write_whole

HTML, PLAIN, CODE = "text/html", "text/plain", "text/x-code"
_HTML_SUFFIXES = frozenset((".html", ".htm", ".xhtml", ".shtml"))
_CODE_SUFFIXES = frozenset(
    """
    .asm .awk .bash .bat .c .cc .clj .cljs .cmake .cpp .cs .css .cu .cuh .cxx .d .dart .el .elm .erl .ex .exs .f .f03
    .f08 .f90 .f95 .fish .for .fs .fsx .go .gradle .groovy .h .hcl .hh .hpp .hs .hxx .i .inc .java .jl .js .jsx .kt .kts
    .lean .less .lisp .lua .m .m4 .ml .mli .mm .nim .nix .pas .php .pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rkt .rs .s
    .sass .scala .scm .scss .sh .sol .sql .sv .svelte .swift .tcl .tex .tf .thy .ts .tsx .v .vb .vhd .vhdl .vim .vue
    .wat .zig .zsh
    """.split()
)
LEFT_OUT = "left_out"  # in the metadata of a document that the reader drops: the reason
_SNIFFED_BYTES = 2**16
_FIELDS = ("id", "url", "date", "media_type")  # of a row, taken where it has them


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
    """`text_field` holds the text in JSONL and Parquet. A document of more than `max_document_bytes` is dropped without being read whole: a
    task needs at most about ten times as much memory."""

    text_field: str = "text"  # that holds the text in JSONL and Parquet
    max_document_bytes: int = 2**26  # above which a document is dropped without being read whole

    def __post_init__(self):
        if not self.text_field:
            raise UserError("curation text_field is empty: name the field that holds the text")
        if self.max_document_bytes < 1:
            raise UserError(f"curation max_document_bytes is {self.max_document_bytes}: it must be 1 or more")


def find_inputs(sources: tuple[str, ...], leave_out: Path) -> list[Path]:
    """Returns the files that globs, files and directories name, sorted, each once, not under `leave_out`.

    Raises UserError for a source without files, a directory that cannot be read, and a file named by itself that is of no known format.
    """
    files = find_files(sources, leave_out)
    for source in sources:
        path = user_path(source)
        for _ in os.walk(path, onerror=_refuse) if path.is_dir() else ():
            pass
        if path.is_file() and find_format(path).kind == "text":
            with open_format(path, find_format(path).compression) as file:
                if decode(file.read(_SNIFFED_BYTES)) is None:
                    raise UserError(f"source {source} is of an unknown format: give WARC, HTML, JSONL, Parquet, plain text or source code")
    return files


def _refuse(error: OSError) -> None:
    raise UserError(f"directory {error.filename} cannot be read ({error.strerror}): make it readable, or name what is to be read beside it")


def plan_tasks(files: Sequence[Path]) -> list[list[Piece]]:
    """Cuts the work into tasks of about equal size: the same ones for the same files, whoever does it. A WARC is never cut."""
    return work_units(files)


class Reader(Block):
    """Task `rank` yields the documents of `tasks[rank]`: id FILE#N (or the row's own), metadata url, date, source and media_type.

    Counts and logs what it leaves out, like any block; what is damaged or cannot be read goes to `problems`/TASK.json instead, as a list of
    {"file", "reason"}. One document is in memory at a time.
    """

    type, name = "reader", "reading"
    problems: Path | None = None  # a directory, set by the phase

    def __init__(self, tasks: list[list[Piece]], config: ReadingConfig = ReadingConfig()):
        super().__init__()
        self.tasks = tasks
        self.config = config
        self.found: list[dict[str, str]] = []  # the problems of the last task

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.found = []
        yield from self.sift((doc for piece in self.tasks[rank] for doc in self._read(piece)), self.filter)
        if self.problems:
            path = task_file(self.problems, rank, "json")
            write_whole(path, json.dumps(self.found, indent=1))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return (False, doc.metadata[LEFT_OUT]) if LEFT_OUT in doc.metadata else True

    def _read(self, piece: Piece) -> Iterator[Document]:
        format = find_format(piece.path)
        if format.kind == "warc":
            return self._read_warc(piece.path)
        return self._read_rows(piece) if format.holds_rows else self._read_file(piece.path)

    def _read_warc(self, path: Path) -> Iterator[Document]:
        damaged = 0
        try:
            for capture in read_captures(path, self.config.max_document_bytes):
                if capture is None:
                    damaged += 1
                    continue
                text = None if capture.reason else decode(capture.content, capture.charset, capture.media_type == HTML)
                reason = capture.reason or ("not_text" if text is None else "")
                yield _document(text, f"{path}#{capture.number}", path, capture.media_type, without_fragment(capture.url), capture.date, reason=reason)
        except MemoryError:
            raise
        except Exception as error:  # of the file system, or of the library
            self._report(path, f"cannot be read: {getattr(error, 'strerror', None) or error}")
        if damaged:
            self._report(path, f"damaged stretches: {damaged}")

    def _read_rows(self, piece: Piece) -> Iterator[Document]:
        skipped: Counter[str] = Counter()
        for position, row in read_rows(piece, self.config.text_field, _FIELDS, skipped, self.config.max_document_bytes):
            identifier, url, date, media_type = (row.get(field) for field in _FIELDS)
            yield _document(
                row[self.config.text_field].replace("\0", ""),
                str(identifier) if isinstance(identifier, str | int) and identifier != "" else f"{piece.path}#{position}",
                piece.path,
                media_type if media_type in (HTML, CODE) else PLAIN,
                url,
                date,
            )
        for index in range(skipped.pop(TOO_LONG, 0)):
            yield _document(None, f"{piece.path}#too_long_{piece.start}_{index}", piece.path, PLAIN, reason="too_long")
        for reason, count in sorted(skipped.items()):
            self._report(piece.path, f"{reason}: {count}")

    def _read_file(self, path: Path) -> Iterator[Document]:
        compression = find_format(path).compression
        suffix = Path(path.stem if compression else path.name).suffix.lower()
        media_type = HTML if suffix in _HTML_SUFFIXES else CODE if suffix in _CODE_SUFFIXES else PLAIN
        text, reason = None, "too_long"
        try:
            with open_format(path, compression) as file:
                content = file.read(self.config.max_document_bytes + 1)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # also of the library that decompresses it
            self._report(path, f"cannot be read: {getattr(error, 'strerror', None) or error}")
            return
        if len(content) <= self.config.max_document_bytes:
            text, reason = decode(content, is_html=media_type == HTML), "not_text"
        yield _document(text, f"{path}#0", path, media_type, reason=reason if text is None else "")

    def _report(self, path: Path, reason: str) -> None:
        self.stat_update("problems")
        self.found.append({"file": _unicode(str(path)), "reason": reason})


def _document(
    text: str | None, identifier: str, source: Path, media_type: str, url: Any = "", date: Any = "", reason: str = ""
) -> Document:
    url = _unicode(url) if isinstance(url, str) else ""
    metadata = {"url": url, "date": _iso_date(date), "source": _unicode(str(source)), "media_type": media_type}
    if reason:
        metadata[LEFT_OUT] = reason
    return Document(text or "", _unicode(identifier), metadata=metadata)


def _unicode(text: str) -> str:
    """Returns the text without the lone surrogates that JSON and names of files can spell."""
    return text.encode("utf-8", "replace").decode()


def _iso_date(date: Any) -> str:
    """Returns the date in UTC as 2024-01-31T12:00:00Z, so that later dates are greater strings; "" where it is none."""
    try:
        if isinstance(date, str):
            date = datetime.datetime.fromisoformat(date.strip())
        elif isinstance(date, datetime.date) and not isinstance(date, datetime.datetime):
            date = datetime.datetime(date.year, date.month, date.day)
        if not isinstance(date, datetime.datetime):
            return ""
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
        return date.astimezone(datetime.UTC).replace(tzinfo=None).isoformat(timespec="seconds") + "Z"
    except (ValueError, OverflowError):
        return ""
