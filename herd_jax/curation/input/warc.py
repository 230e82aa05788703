"""Documents of a WARC file, compressed or not, past whatever is damaged in it."""

import base64
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastwarc import ArchiveIterator, WarcRecord, WarcRecordType

IS_WARC = re.compile(r"\.(?:warc|wet)(?:\.gz|\.zst)?$", re.IGNORECASE)
_STARTS = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd"}  # of a record in a compressed file
_START = b"WARC/1."
_CHUNK_BYTES = 2**20
_HEADER_BYTES = 2**16  # of HTTP, allowed on top of a document's bytes
_HTML = ("text/html", "application/xhtml+xml")
_LOOKS_LIKE_HTML = re.compile(rb"\s*(?:<!--.{0,1000}?-->\s*)?<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
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
    memory, and none of more than `max_bytes`. Raises OSError where the file cannot be opened.
    """
    number = 0
    with path.open("rb") as file:
        start: int | None = 0
        while start is not None:
            file.seek(start)
            position, has_read = start, start == 0
            try:
                for record in ArchiveIterator(file, parse_http=False):
                    position = record.stream_pos
                    capture = _read_capture(record, number, max_bytes)
                    has_read = True
                    if capture:
                        yield capture
                    number += 1
                return
            except (OSError, EOFError):
                if has_read:
                    yield None
            start = _find(file, _STARTS.get(path.suffix.lower(), _START), position + 1)


def _read_capture(record: WarcRecord, number: int, max_bytes: int) -> Capture | None:
    """Returns the document of a record, None where it is none; raises OSError where it is damaged."""
    if record.record_type & _DOCUMENT_TYPES == 0:
        return None
    headers = record.headers
    capture = Capture(number, (headers.get("WARC-Target-URI") or "").strip("<>"), headers.get("WARC-Date") or "")
    if record.content_length > max_bytes + _HEADER_BYTES:
        return dataclasses.replace(capture, reason="too_long")
    block = record.reader.read(record.content_length) if record.content_length else b""
    if len(block) < record.content_length or not _is_intact(block, headers.get("WARC-Block-Digest") or ""):
        raise OSError("the record is cut or altered")
    if headers.get("WARC-Truncated"):
        return dataclasses.replace(capture, reason="truncated")
    media_type, charset, content = headers.get("Content-Type") or "", "", block
    if record.record_type == WarcRecordType.response:
        status, media_type, charset, content = _read_http(block, max_bytes)
        if status != 200:
            return dataclasses.replace(capture, reason="status_not_200")
    media_type = (headers.get("WARC-Identified-Payload-Type") or media_type).partition(";")[0].strip().lower()
    if media_type in _HTML or not media_type and _LOOKS_LIKE_HTML.match(content):
        media_type = "text/html"
    elif media_type != "text/plain":
        return dataclasses.replace(capture, reason="not_html_or_plain")
    if len(content) > max_bytes:
        return dataclasses.replace(capture, reason="too_long")
    return dataclasses.replace(capture, media_type=media_type, charset=charset, content=content)


def _read_http(block: bytes, max_bytes: int) -> tuple[int | None, str, str, bytes]:
    """Returns status, media type, charset and body without its transfer and content encodings."""
    for decode in ("all", "none"):  # some archives keep the header of an encoding that they took away
        record = WarcRecord()
        record.init_headers(WarcRecordType.response, content_length=len(block))
        record.is_http = True
        record.set_bytes_content(block)
        try:
            record.parse_http(auto_decode=decode)
            content = record.reader.read(max_bytes + 1)
            break
        except OSError:
            content = b""
    return record.http_headers and record.http_headers.status_code, record.http_content_type or "", record.http_charset or "", content


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
