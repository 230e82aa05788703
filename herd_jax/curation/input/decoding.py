"""Bytes of unknown encoding to text."""

import codecs

from resiliparse.parse.encoding import detect_encoding

from herd_jax.curation.input.charsets import codecs_of, decode_with

MAX_CONTROL = 0.02  # share of control characters above which bytes are no text; compressed data has 0.1
# Bytes that a codec may leave unexplained for each foreign character that it explains. What is no UTF-8 has about as many of both.
MAX_UTF8_ERRORS, MAX_ERRORS = 0.1, 0.03
MAX_UNEXPLAINED = 0.3  # share of U+FFFD above which what remains is no text
_CONTROL = bytes({*range(32), 127} - {*b"\t\n\r\f\v\x1b"})
_SAMPLE_BYTES = 2**16
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode(content: bytes, charset: str = "", is_html: bool = False) -> str | None:
    """Returns the text, or None where the bytes are not text. Never fails: what the encoding does not explain becomes U+FFFD.

    The encoding is that of a byte order mark, else UTF-8 if the bytes are UTF-8 but for a few (which other text hardly ever is, whatever a server
    says), else the declared `charset`, else that of the page's meta element, if one explains all but a few bytes, else the one that the bytes
    look like; of none that explains all but a few, the one that explains the most.
    """
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return _clean(content.decode(encoding, "replace"))
    declared = codecs_of(charset)
    is_wide = any(codec.startswith("utf-16") for codec in declared)
    is_shifting = "iso2022_kr" in declared  # which has two control characters of its own
    is_stateful = b"\x1b" in content or b"~{" in content and "hz" in declared  # ASCII to look at
    sample = content[:_SAMPLE_BYTES]
    num_control = len(sample) - len(sample.translate(None, _CONTROL))
    if num_control > MAX_CONTROL * len(sample) and not is_wide and not is_shifting:
        return None
    utf8 = () if is_wide or is_stateful else ("utf-8",)
    best, fewest = "", None
    for candidates in (lambda: utf8, lambda: declared, lambda: _of_meta(content) if is_html else (), lambda: _looks_like(content)):
        for codec in candidates():
            text, errors = decode_with(codec, content)
            if errors == 0 or errors <= (MAX_UTF8_ERRORS * _num_foreign(text) if codec == "utf-8" else 1 + MAX_ERRORS * _num_foreign(text)):
                return _clean(text)
            if fewest is None or errors < fewest:
                best, fewest = text, errors
    return _clean(best) if fewest <= MAX_UNEXPLAINED * len(best) else None


def _of_meta(content: bytes) -> tuple[str, ...]:
    return codecs_of(detect_encoding(content, from_html_meta=True) or "")


def _looks_like(content: bytes) -> tuple[str, ...]:
    return codecs_of(detect_encoding(content, html5_compatible=False) or "utf-8") or ("utf-8",)


def _num_foreign(text: str) -> int:
    """Returns the number of characters beyond ASCII that a codec explains."""
    return len(text) - len(text.encode("ascii", "ignore")) - text.count("\ufffd")


def _clean(text: str) -> str:
    return text.replace("\0", "") if "\0" in text else text
