"""Charset labels as the web means them: those of the Encoding Standard of the WHATWG, and the codecs of Python that read the most of each."""

import codecs
import re
from collections.abc import Callable

from resiliparse.parse.encoding import map_encoding_to_html5

# What the standard reads a label as, in Python's names, where Python's codec of that label reads less.
_WIDER = {
    "shift_jis": ("cp932",),  # windows-31j
    "euc_kr": ("cp949",),  # windows-949, the unified hangul code
    "big5": ("big5hkscs", "cp950"),
    "gb2312": ("gb18030",),
    "gbk": ("gb18030",),
    "hz": ("hz",),
    "ascii": ("cp1252",),
    "iso8859-1": ("cp1252",),
    "iso8859-9": ("cp1254",),
    "iso8859-11": ("cp874",),
    "tis-620": ("cp874",),
    "mac-roman": ("mac-roman",),
}
_ODD_LABEL = re.compile(r"(?:x-)?(?:cp|win|windows|ms|microsoft-cp|ibm)?[-_ ]?(\d{3,5})")
_CHARSETS = re.compile(r"cp\d|iso|euc|koi8|mac|hz|johab|utf-(?!7)|big5|gb|shift|kz1048|ptcp154|tis|hp-roman8|ascii|latin")
_SINGLE_BYTE = re.compile(r"cp(?:125\d|874|866)|iso8859|koi8|mac-")
_EUC_JP = re.compile(rb"[\xa1-\xfe]{2}|\x8e[\xa1-\xdf]|\x8f[\xa1-\xfe]{2}|[\x00-\x7f]+|.", re.DOTALL)
_ESCAPE = re.compile(rb"(\x1b(?:\([BJI]|\$[@B]|\$\(D))")


def codecs_of(label: str) -> tuple[str, ...]:
    """Returns the codecs for a label, the best one first; none for a label that nobody knows."""
    label = label.strip().strip("\"'").strip().lower()
    name = map_encoding_to_html5(label, fallback_utf8=False) or _python_name(label)
    if not name:
        return ()
    return _WIDER.get(name, (name,))


def _python_name(label: str) -> str:
    """Returns Python's name for a label that the standard has not."""
    number = _ODD_LABEL.fullmatch(label)
    for candidate in (label, f"cp{number[1]}" if number else ""):
        try:
            found = codecs.lookup(candidate)
        except (LookupError, ValueError):
            continue
        if _CHARSETS.match(found.name):  # and not such as base64, punycode or unicode_escape
            return found.name.replace("_", "-") if found.name.startswith(("iso8859", "mac")) else found.name
    return ""


def decode_with(codec: str, content: bytes) -> tuple[str, int]:
    """Returns the text of the bytes in a codec, and how many characters of it stand for bytes that it does not explain (U+FFFD)."""
    try:
        return content.decode(codec), 0
    except UnicodeError:
        pass
    if codec in _JAPANESE:
        text = _JAPANESE[codec](content)
    else:
        text = content.decode(codec, "herd_jax.controls" if _SINGLE_BYTE.match(codec) else "replace")
    return text, text.count("\ufffd") - (content.count("\ufffd".encode()) if codec == "utf-8" else 0)


def _controls(error: UnicodeError) -> tuple[str, int]:
    """Reads bytes without a meaning as control characters, which the standard does for the windows codes."""
    return "".join(map(chr, error.object[error.start : error.end])), error.end


codecs.register_error("herd_jax.controls", _controls)


def _euc_jp(content: bytes) -> str:
    """Decodes EUC-JP with the characters of NEC and IBM, such as (1) in a circle, which only windows-31j has among Python's codecs."""
    return "".join(map(_euc_jp_piece, _EUC_JP.findall(content)))


def _euc_jp_piece(piece: bytes) -> str:
    if piece[0] < 0x80:
        return piece.decode("ascii")
    if len(piece) == 2 and piece[0] == 0x8E:
        return piece[1:].decode("cp932", "replace")
    if len(piece) == 2:
        return _jis(piece[0] & 0x7F, piece[1] & 0x7F)
    return piece.decode("euc_jp", "replace") if len(piece) == 3 else "\ufffd"


def _iso_2022_jp(content: bytes) -> str:
    """Decodes ISO-2022-JP with the characters of NEC and IBM."""
    parts, state = [], b"\x1b(B"
    for part in _ESCAPE.split(content):
        if _ESCAPE.fullmatch(part):
            state = part
        elif state in (b"\x1b(B", b"\x1b(J"):
            parts.append(part.decode("ascii", "replace"))
        elif state == b"\x1b(I":
            parts.append(bytes(byte | 0x80 for byte in part).decode("cp932", "replace"))
        elif state == b"\x1b$(D":
            parts.append(b"".join(b"\x8f" + bytes((a | 0x80, b | 0x80)) for a, b in zip(part[::2], part[1::2])).decode("euc_jp", "replace"))
        else:
            parts += [_jis(first, second) for first, second in zip(part[::2], part[1::2])]
    return "".join(parts)


def _jis(first: int, second: int) -> str:
    """Returns the character in that row and cell of JIS X 0208, as windows-31j has it."""
    lead = (first + 1) // 2 + (0x70 if first < 0x5F else 0xB0)
    trail = second + (0x1F if first % 2 and second < 0x60 else 0x20 if first % 2 else 0x7E)
    return bytes((lead, trail)).decode("cp932", "replace") if lead < 0x100 and trail < 0x100 else "\ufffd"


_JAPANESE: dict[str, Callable[[bytes], str]] = {
    "euc_jp": _euc_jp, "iso2022_jp": _iso_2022_jp, "iso2022_jp_ext": _iso_2022_jp, "iso2022_jp_2": _iso_2022_jp
}  # fmt: skip
