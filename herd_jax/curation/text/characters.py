"""Classes of Unicode code points as bit flags in one table, so that a rule about characters is one numpy expression over a text."""

import functools
import re
import unicodedata

import numpy as np
from datatrove.utils.text import PUNCTUATION_SET

SPACE = np.uint16(1 << 0)
ALPHA = np.uint16(1 << 1)  # str.isalpha
LOWER = np.uint16(1 << 2)  # lower case, or a script without case
UPPER = np.uint16(1 << 3)  # upper case, or a script without case
DIGIT = np.uint16(1 << 4)  # 0 to 9
NOT_SYMBOL = np.uint16(1 << 5)  # outside datatrove's punctuation
NOT_PUNCTUATION = np.uint16(1 << 6)  # outside the Unicode category P
ENDS_SENTENCE = np.uint16(1 << 7)
ICON = np.uint16(1 << 8)  # pictures and signs, words of their own everywhere
PREFIX = np.uint16(1 << 9)  # split off at the begin of a word
SUFFIX = np.uint16(1 << 10)  # split off at its end
AFTER_DIGIT = np.uint16(1 << 11)  # split off at its end, behind a digit
DOT_FOLLOWS = np.uint16(1 << 12)  # a dot behind it is a full stop
APOSTROPHE = np.uint16(1 << 13)
ALONE = np.uint16(1 << 14)  # a letter of a script without spaces: a word of its own
INERT = np.uint16(1 << 15)  # letters and marks: no rule cuts around them

LIMIT = 0x40000  # the planes that hold text; code points above count as the last one below
_AFFIXES = ",:;!?()[]{}<>_#*&'\"`´¡¿·،؛؟٪。、，！？：；～｡､"
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_SENTENCE_ENDS = "!.?։؟۔܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？｡。"


@functools.cache
def flags() -> np.ndarray:
    """Returns the flags of each code point: uint16 [LIMIT]."""
    return np.fromiter((_flags(chr(point)) for point in range(LIMIT)), np.uint16, LIMIT)


@functools.cache
def folded() -> np.ndarray:
    """Returns each code point in lower case without diacritics, any digit as 0, and 0 for a mark to drop: uint32 [LIMIT]."""
    return np.fromiter((_fold(chr(point)) for point in range(LIMIT)), np.uint32, LIMIT)


def code_points(text: str) -> np.ndarray:
    """Returns uint32 [len(text)]; lone surrogates are code points like others."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def kinds_of(points: np.ndarray, margin: int = 0) -> np.ndarray:
    """Returns the flags of code points `points` [T], with so many spaces before and behind them: uint16 [T + 2 * margin]."""
    kinds = np.full(len(points) + 2 * margin, SPACE)
    flags().take(points, mode="clip", out=kinds[margin : margin + len(points)])
    return kinds


def _flags(char: str) -> int:
    if char.isspace():
        return SPACE
    category = unicodedata.category(char)
    found = NOT_SYMBOL * (char not in PUNCTUATION_SET) | NOT_PUNCTUATION * (category[0] != "P")
    if char.isalpha():
        uncased = not (char.islower() or char.isupper())
        lower, upper = char.islower() or uncased, char.isupper() or uncased
        found |= ALONE * bool(_UNSPACED.match(char))
        return found | ALPHA | INERT | (LOWER | DOT_FOLLOWS) * lower | UPPER * upper
    if category[0] == "M":
        return found | INERT
    is_affix = char in _AFFIXES or (not char.isascii() and (category in ("Pi", "Pf", "Ps", "Pe") or char in _SENTENCE_ENDS))
    return (
        found
        | DIGIT * (char in "0123456789")
        | ENDS_SENTENCE * (char in _SENTENCE_ENDS)
        | ICON * (category == "So" or char == "…")
        | PREFIX * (is_affix or char in "§%=—–" or category in ("Sc", "So"))
        | SUFFIX * (is_affix or char in "—–" or category == "So")
        | DOT_FOLLOWS * (is_affix or char in "0123456789%²-+|")
        | AFTER_DIGIT * (category == "Sc" or char in "%+")
        | APOSTROPHE * (char in "'’")
    )


def _fold(char: str) -> int:
    if unicodedata.combining(char) and unicodedata.name(char, "").startswith("COMBINING"):
        return 0
    if char.isdigit():
        return ord("0")
    if char in "’ʼ＇":
        return ord("'")
    base = unicodedata.normalize("NFKD", char)[0]
    lower = base.lower()
    return ord(unicodedata.normalize("NFKD", lower)[0])
