"""The body of an HTTP response without its transfer encoding, then without its content encodings.

Archives keep some of these and take others away, with the headers or without. So a layer is taken off where the bytes show that it is there.
"""

import re
import zlib
from collections.abc import Callable

import brotli
import pyarrow

_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?(\r?\n)")
_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"


class Damaged(Exception):
    """The body is cut or altered."""


def decode_body(body: bytes, transfer: str, content: str, max_bytes: int) -> bytes:
    """Returns at most `max_bytes` of the body without the encodings that the headers Transfer-Encoding and Content-Encoding name. Raises Damaged."""
    transfers, contents = ([name.strip().lower() for name in header.split(",")] for header in (transfer, content))
    if "chunked" in transfers:
        body = _dechunk(body)
    for name in reversed([*contents, *transfers]):
        if name in _DECODERS:
            body = _DECODERS[name](body, max_bytes)
    return _ungzip(body, max_bytes)[:max_bytes]  # no text begins as gzip does: an archive may keep the encoding without its header


def _dechunk(body: bytes) -> bytes:
    """Takes chunks apart (RFC 9112, section 7.1); a body that does not begin with one was taken apart before."""
    parts, position = [], 0
    while size := _CHUNK_SIZE.match(body, position):
        start, length = size.end(), int(size[1], 16)
        if length == 0:
            return b"".join(parts)
        end = start + length
        if end >= len(body) and not parts and size[2] == b"\n":  # a line of text that reads as a number, rather
            return body
        if end >= len(body):
            raise Damaged
        position = end + (2 if body.startswith(b"\r\n", end) else 1 if body.startswith(b"\n", end) else 0)
        if position == end:
            break
        parts.append(body[start:end])
    if parts:
        raise Damaged
    return body


def _ungzip(body: bytes, max_bytes: int) -> bytes:
    """Decompresses the members of a gzip file, up to what is none."""
    parts, room = [], max_bytes
    while body.startswith(_GZIP) and room > 0:
        decompressor = zlib.decompressobj(wbits=31)
        try:
            parts.append(decompressor.decompress(body, room))
        except zlib.error as error:
            raise Damaged from error
        room -= len(parts[-1])
        if not decompressor.eof and room > 0:
            raise Damaged
        body = decompressor.unused_data
    return b"".join(parts) if parts else body


def _inflate(body: bytes, max_bytes: int) -> bytes:
    """Decompresses zlib's format or, as some servers send it, the raw one of RFC 1951."""
    for wbits in (15, -15):
        decompressor = zlib.decompressobj(wbits=wbits)
        try:
            found = decompressor.decompress(body, max_bytes)
        except zlib.error:
            continue
        if decompressor.eof or len(found) == max_bytes:
            return found
        if wbits == 15 and body:
            raise Damaged
    return body


def _unbrotli(body: bytes, max_bytes: int) -> bytes:
    decompressor = brotli.Decompressor()
    try:
        parts, room = [decompressor.process(body, output_buffer_limit=max_bytes)], max_bytes
        while not decompressor.is_finished() and (room := room - len(parts[-1])) > 0 and parts[-1]:
            parts.append(decompressor.process(b"", output_buffer_limit=room))
    except brotli.error:
        return body
    if body and not decompressor.is_finished() and room > 0:
        raise Damaged
    return b"".join(parts)


def _unzstd(body: bytes, max_bytes: int) -> bytes:
    if not body.startswith(_ZSTD):
        return body
    try:
        return pyarrow.CompressedInputStream(pyarrow.BufferReader(body), "zstd").read(max_bytes)
    except OSError as error:
        raise Damaged from error


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _ungzip, "x-gzip": _ungzip, "deflate": _inflate, "br": _unbrotli, "zstd": _unzstd,
}  # fmt: skip
