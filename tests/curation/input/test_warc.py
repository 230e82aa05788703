"""WARC files as archives of all ages have them: their line ends, their versions, and HTTP bodies with layers that stayed or went."""

import gzip
import zlib

import pytest

from herd_jax.curation.input.http_body import Damaged, decode_body
from herd_jax.curation.input.warc import read_captures

brotli, pyarrow = pytest.importorskip("brotli"), pytest.importorskip("pyarrow")

PAGE = b"<html><body><p>" + b" ".join(b"word%d" % n for n in range(400)) + b"</p></body></html>"
RAW = zlib.compressobj(wbits=-15)
DEFLATED = RAW.compress(PAGE) + RAW.flush()
ZSTD = bytes(pyarrow.compress(PAGE, "zstd", asbytes=True))


def chunked(body, size=600, extension=b"", eol=b"\r\n"):
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x" % len(part) + extension + eol + part + eol for part in parts) + b"0" + eol + eol


def record(body=PAGE, eol="\r\n", http_eol="\r\n", version="1.0", kind="response", status="HTTP/1.1 200 OK", headers=(), number=0):
    lines = [status, "Content-Type: text/html", *headers]
    block = (http_eol.join(lines) + http_eol * 2).encode() + body
    head = [
        f"WARC/{version}", f"WARC-Type: {kind}", f"WARC-Target-URI: http://example.org/{number}", "WARC-Date: 2009-01-13T18:05:10Z",
        f"WARC-Record-ID: <urn:uuid:{number}>", "Content-Type: application/http; msgtype=response", f"Content-Length: {len(block)}",
    ]  # fmt: skip
    return (eol.join(head) + eol * 2).encode() + block + eol.encode() * 2


def read(path, data):
    path.write_bytes(data)
    return [capture and (capture.reason, capture.content) for capture in read_captures(path, 2**20)]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
@pytest.mark.parametrize("version", ["0.17", "0.18", "1.0", "1.1"])
@pytest.mark.parametrize("eol, http_eol", [("\n", "\n"), ("\n", "\r\n"), ("\r\n", "\n"), ("\r\n", "\r\n")])
def test_line_ends_and_versions(tmp_path, name, version, eol, http_eol):
    compress = {"a.warc": bytes, "a.warc.gz": gzip.compress, "a.warc.zst": lambda data: bytes(pyarrow.compress(data, "zstd", asbytes=True))}[name]
    info = record(b"", eol, http_eol, version, "warcinfo")
    records = [info, *(record(PAGE + b"%d" % i, eol, http_eol, version, number=i) for i in range(3))]
    assert read(tmp_path / name, b"".join(map(compress, records))) == [("", PAGE + b"%d" % i) for i in range(3)]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_file_may_change_its_line_ends(tmp_path, name):
    """Such as two archives that somebody joined."""
    compress = bytes if name == "a.warc" else gzip.compress
    records = [record(PAGE, "\r\n", number=0), record(PAGE, "\n", "\n", number=1), record(PAGE, "\r\n", number=2), record(PAGE, "\r\n", number=3)]
    found = read(tmp_path / name, b"".join(map(compress, records)))
    assert [capture for capture in found if capture] == [("", PAGE)] * 4


def test_what_is_no_warc_is_an_error(tmp_path):
    with pytest.raises(OSError, match="there is no record of a WARC in it"):
        read(tmp_path / "a.warc", b"\n\n\n\n")
    for data in (b"plain text of some lines\nand more of it\n", gzip.compress(b"nothing of the kind"), PAGE):
        assert read(tmp_path / "a.warc", data) == read(tmp_path / "a.warc.gz", data) == [None]
    assert read(tmp_path / "a.warc", b"") == []


def test_records_that_hold_no_document_are_counted_or_known(tmp_path):
    kinds = ("warcinfo", "request", "metadata", "revisit", "response", "gossip")
    assert read(tmp_path / "a.warc", b"".join(record(kind=kind) for kind in kinds)) == [("", PAGE), ("unknown_record_type", b"")]
    odd = [record(status=status) for status in ("<html>", "", "HTTP/1.1", "ICY 200 OK", "HTTP/2 200")]
    reasons = [reason for reason, _ in read(tmp_path / "a.warc", b"".join(odd))]
    assert reasons[:3] == ["http_header_not_read"] * 3 and reasons[4] == ""


def test_a_page_that_quotes_a_warc_holds_no_record(tmp_path):
    quoting = b"<html><pre>\n" + record(b"quoted").replace(b"<", b"&lt;") + b"</pre>" + PAGE
    assert read(tmp_path / "a.warc", record(quoting) + record(PAGE)) == [("", quoting), ("", PAGE)]
    assert read(tmp_path / "b.warc", record(PAGE) + record(quoting)) == [("", PAGE), ("", quoting)]


@pytest.mark.parametrize(
    "body, transfer, content",
    [
        (PAGE, "", ""),
        (chunked(PAGE), "chunked", ""),
        (chunked(PAGE, extension=b";ext=1"), "Chunked", "identity"),
        (chunked(PAGE, extension=b' ; a="b"'), "chunked", "none"),
        (chunked(PAGE, eol=b"\n"), "chunked", ""),
        (PAGE, "chunked", ""),  # the chunks went, the header stayed
        (gzip.compress(PAGE), "chunked", "gzip"),
        (chunked(gzip.compress(PAGE)), "chunked", "x-gzip"),
        (chunked(PAGE), "chunked", "gzip"),  # the gzip went, its header stayed
        (PAGE, "chunked", "gzip, br"),
        (chunked(gzip.compress(PAGE)), "gzip, chunked", ""),
        (gzip.compress(gzip.compress(PAGE)), "", "gzip, gzip"),
        (gzip.compress(PAGE[:900]) + gzip.compress(PAGE[900:]), "", "gzip"),
        (gzip.compress(PAGE), "", ""),  # the header went
        (gzip.compress(PAGE) + b"\r\n", "", "GZIP"),
        (zlib.compress(PAGE), "", "deflate"),
        (DEFLATED, "", "deflate"),
        (PAGE, "", "deflate"),
        (chunked(DEFLATED, extension=b";x"), "chunked", "deflate"),
        (brotli.compress(PAGE), "", "br"),
        (PAGE, "", "br"),
        (ZSTD, "", "zstd"),
        (PAGE, "", "zstd"),
        (PAGE, "", "utf-8"),
    ],
)
def test_layers_that_stayed_or_went(body, transfer, content):
    assert decode_body(body, transfer, content, 2**20) == PAGE


def test_a_text_that_begins_like_a_chunk_was_taken_apart_before():
    for text in (b"2024\nwas a year", b"abc", b"add the flour\r\n", b"5\r\nhelloes\r\n", b"c0ffee\n"):
        assert decode_body(text, "chunked", "", 2**20) == text


@pytest.mark.parametrize(
    "body, transfer, content",
    [
        (chunked(PAGE)[:-400], "chunked", ""),
        (chunked(PAGE)[:300], "chunked", ""),
        (chunked(PAGE)[:-5], "chunked", ""),  # without its end
        (gzip.compress(PAGE)[:-300], "", "gzip"),
        (gzip.compress(PAGE)[:-6], "", "gzip"),
        (chunked(gzip.compress(PAGE)[:-300]), "chunked", "gzip"),
        (gzip.compress(PAGE)[:200] + b"?" + gzip.compress(PAGE)[201:], "", "gzip"),
        (zlib.compress(PAGE)[:-300], "", "deflate"),
        (brotli.compress(PAGE)[:-300], "", "br"),
        (ZSTD[:-300], "", "zstd"),
    ],
)
def test_a_body_that_is_cut_or_altered_is_none(body, transfer, content):
    with pytest.raises(Damaged):
        decode_body(body, transfer, content, 2**20)


@pytest.mark.parametrize("content", ["gzip", "deflate", "br", "zstd"])
def test_bombs_are_read_as_far_as_is_allowed(content):
    zeros = bytes(50_000_000)
    compress = {"gzip": gzip.compress, "deflate": zlib.compress, "br": lambda data: brotli.compress(data, quality=1),
                "zstd": lambda data: bytes(pyarrow.compress(data, "zstd", asbytes=True))}[content]  # fmt: skip
    assert decode_body(compress(zeros), "", content, 1000) == bytes(1000)


@pytest.mark.parametrize("beginning", [b"\xef\xbb\xbf<!DOCTYPE html>", b'<?xml version="1.0" encoding="utf-8"?>\n<!-- a -->\n<html>', b"<title>T</title>", b"\n <meta charset=utf-8>"])
def test_pages_without_a_media_type(tmp_path, beginning):
    content = beginning + PAGE
    assert read(tmp_path / "a.warc", record(content).replace(b"Content-Type: text/html\r\n", b"Xontent-Type: text/html\r\n")) == [("", content)]
    for other in (b"just text < html", b"<svg>", b"{}"):
        (found,) = read(tmp_path / "a.warc", record(other).replace(b"Content-Type: text/html\r\n", b"Xontent-Type: text/html\r\n"))
        assert found[0] == "not_html_or_plain"
