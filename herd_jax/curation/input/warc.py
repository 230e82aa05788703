"""Documents of a WARC file, compressed or not, past whatever is damaged in it."""

import base64
import contextlib
import dataclasses
import hashlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow
from fastwarc import ArchiveIterator, WarcRecord, WarcRecordType

from herd_jax.curation.input.http_body import Damaged, decode_body
from herd_jax.data.formats import find_format

_STARTS = {"gz": b"\x1f\x8b\x08", "zst": b"\x28\xb5\x2f\xfd"}  # of a record in a compressed file
_START = b"WARC/"
_CHUNK_BYTES = 2**20
_HEADER_BYTES = 2**16  # of HTTP, allowed on top of a document's bytes
_HTML = ("text/html", "application/xhtml+xml")
_LOOKS_LIKE_HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml\b[^<>]{0,200}>\s*)?(?:<!--.{0,1000}?-->\s*){0,3}<(?:!doctype\s+html|html|head|body|title|meta|script|link|style|h1|table)\b",
    re.IGNORECASE | re.DOTALL,
)  # as browsers sniff it, nearly
_DOCUMENT_TYPES = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion


@dataclasses.dataclass(frozen=True)
class Capture:
    """A document as it was crawled, or with a `reason` (and no content) why it is none for us."""

    number: int  # of the record in the file
    url: str
    date: str
    reason: str = ""
    media_type: str = ""  # text/html | text/plain
    charset: str = ""  # as declared
    content: bytes = b""


def read_captures(path: Path, max_bytes: int) -> Iterator[Capture | None]:
    """Yields the captures of a file in its order; None for each damaged stretch, after which reading goes on at the next record found.

    Responses with status 200 and bodies of HTML or plain text have content; resources and conversions likewise. A stretch is damaged
    where a record does not decompress, does not parse, ends too early or does not have the digest that it states. At most one record is in
    memory, and none of more than `max_bytes`. Raises OSError where the file cannot be opened, or has something in it and no record.
    """
    compression = find_format(path).compression
    number, is_damaged, pattern = 0, False, _STARTS.get(compression, _START)
    with path.open("rb") as file:
        start: int | None = 0
        while start is not None:
            quirks = _has_plain_lines(path, compression, start)
            file.seek(start)
            position, has_read, resume = start, start == 0, None
            try:
                for record in ArchiveIterator(file, parse_http=False, quirks_mode=quirks):
                    position = record.stream_pos
                    if not quirks and any("\n" in value for _, value in record.headers.items()) and _has_plain_lines(path, compression, position):
                        resume = position  # the archive was joined from two, and fastwarc took one record for the header of the next
                        break
                    capture = _read_capture(record, number, max_bytes)
                    has_read = True
                    if capture:
                        yield capture
                    number += 1
                    if pattern == _START:  # what a body quotes is no record
                        position += record.content_length
            except MemoryError:
                raise
            except Exception:  # whatever fastwarc raises for what is damaged
                if has_read:
                    yield None
                is_damaged = is_damaged or has_read
            # Also where the iterator ended by itself: that does not say that it read everything.
            start = _find(file, pattern, position + 1) if resume is None else resume
        if not number and not is_damaged and path.stat().st_size:
            raise OSError("there is no record of a WARC in it")


def _has_plain_lines(path: Path, compression: str, start: int) -> bool:
    """Returns whether the record at `start` has lines that end in LF alone, as those of ClueWeb do; such a one is only read in fastwarc's quirks
    mode, which on the other hand passes over damage without a word."""
    with path.open("rb") as file:
        file.seek(start)
        piece = file.read(_CHUNK_BYTES)
    if compression == "gz":
        with contextlib.suppress(zlib.error):
            piece = zlib.decompressobj(wbits=31).decompress(piece, 64)
    elif compression == "zst":
        with contextlib.suppress(OSError):
            piece = pyarrow.CompressedInputStream(pyarrow.BufferReader(piece), "zstd").read(64)
    line, end, _ = piece[:64].lstrip(b"\r\n").partition(b"\n")
    return bool(end) and line.startswith(_START) and not line.endswith(b"\r")


def _read_capture(record: WarcRecord, number: int, max_bytes: int) -> Capture | None:
    """Returns the document of a record, None where it is none; raises OSError where it is damaged."""
    headers = record.headers
    capture = Capture(number, (headers.get("WARC-Target-URI") or "").strip("<>"), headers.get("WARC-Date") or "")
    if record.record_type == WarcRecordType.unknown:
        return dataclasses.replace(capture, reason="unknown_record_type")
    if record.record_type & _DOCUMENT_TYPES == 0:
        return None
    if record.content_length > max_bytes + _HEADER_BYTES:
        return dataclasses.replace(capture, reason="too_long")
    block = record.reader.read(record.content_length) if record.content_length else b""
    if len(block) < record.content_length or not _is_intact(block, headers.get("WARC-Block-Digest") or ""):
        raise OSError("the record is cut or altered")
    if headers.get("WARC-Truncated"):
        return dataclasses.replace(capture, reason="truncated")
    media_type, charset, content = headers.get("Content-Type") or "", "", block
    if record.record_type == WarcRecordType.response:
        http = WarcRecord()
        http.init_headers(WarcRecordType.response, content_length=len(block))
        http.is_http = True
        http.set_bytes_content(block)
        try:
            http.parse_http(auto_decode="none", quirks_mode=True)
            status = http.http_headers.status_code
        except (OSError, AttributeError):
            status = None
        if not isinstance(status, int):
            return dataclasses.replace(capture, reason="http_header_not_read")
        if status != 200:
            return dataclasses.replace(capture, reason="status_not_200")
        media_type, charset = http.http_content_type or "", http.http_charset or ""
        encodings = (http.http_headers.get(name) or "" for name in ("Transfer-Encoding", "Content-Encoding"))
        try:
            content = decode_body(http.reader.read(), *encodings, max_bytes + 1)
        except Damaged:
            return dataclasses.replace(capture, reason="damaged_body")
    media_type = (headers.get("WARC-Identified-Payload-Type") or media_type).partition(";")[0].strip().lower()
    if media_type in _HTML or not media_type and _LOOKS_LIKE_HTML.match(content):
        media_type = "text/html"
    elif media_type != "text/plain":
        return dataclasses.replace(capture, reason="not_html_or_plain")
    if len(content) > max_bytes:
        return dataclasses.replace(capture, reason="too_long")
    return dataclasses.replace(capture, media_type=media_type, charset=charset, content=content)


def _is_intact(block: bytes, digest: str) -> bool:
    algorithm, _, stated = digest.partition(":")
    algorithm = algorithm.lower().replace("-", "")
    if algorithm not in ("md5", "sha1", "sha256", "sha512"):
        return True
    actual = hashlib.new(algorithm, block).digest()
    return stated.upper().rstrip("=") in (base64.b32encode(actual).decode().rstrip("="), actual.hex().upper())


def _find(file: BinaryIO, pattern: bytes, position: int) -> int | None:
    """Returns the next place of the pattern in the file, from `position` on."""
    file.seek(position)
    tail = b""
    while chunk := file.read(_CHUNK_BYTES):
        window = tail + chunk
        if (found := window.find(pattern)) >= 0:
            return position - len(tail) + found
        position += len(chunk)
        tail = window[-len(pattern) + 1 :]
    return None
