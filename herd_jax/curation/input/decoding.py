"""Bytes of unknown encoding to text."""

import codecs

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

MAX_CONTROL = 0.02  # share of control characters above which bytes are no text; compressed data has 0.1
_CONTROL = bytes({*range(32), 127} - {*b"\t\n\r\f\v\x1b"})
_SAMPLE_BYTES = 2**16
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode(content: bytes, charset: str = "", is_html: bool = False) -> str | None:
    """Returns the text, or None where the bytes are not text. Never fails: what no encoding explains becomes U+FFFD.

    The encoding is that of a byte order mark, else UTF-8 if the bytes are valid UTF-8 (which other text hardly ever is, whatever a server
    says), else the declared `charset`, else that of the page's meta element, if one fits, else the one that the bytes look like.
    """
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return _clean(content.decode(encoding, "replace"))
    charset = map_encoding_to_html5(charset, fallback_utf8=False) or ""
    sample = content[:_SAMPLE_BYTES]
    num_control = len(sample) - len(sample.translate(None, _CONTROL))
    if num_control > MAX_CONTROL * len(sample) and not charset.startswith("utf-16"):
        return None
    is_utf8_possible = b"\x1b" not in content and not charset.startswith("utf-16")  # not ISO-2022, which is ASCII to look at
    meta = detect_encoding(content, from_html_meta=True) if is_html else None
    for encoding in ("utf-8" if is_utf8_possible else None, charset, meta):
        try:
            if encoding:
                return _clean(content.decode(encoding))
        except (UnicodeError, LookupError):
            continue
    detected = detect_encoding(content, html5_compatible=False) or "utf-8"
    try:
        return _clean(content.decode(detected, "replace"))
    except LookupError:
        return _clean(content.decode("utf-8", "replace"))


def _clean(text: str) -> str:
    return text.replace("\0", "") if "\0" in text else text
