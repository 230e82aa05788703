"""Classes of Unicode code points as bit flags in one table, so that a rule about characters is one numpy expression over a text."""

import functools
import unicodedata

import numpy as np
from datatrove.utils.text import PUNCTUATION_SET

SPACE, ALPHA, LOWER, UPPER, DIGIT, NOT_SYMBOL, NOT_PUNCTUATION, ENDS_SENTENCE, ICON, PREFIX, SUFFIX, DOT_FOLLOWS, CURRENCY = (
    np.uint16(1 << bit) for bit in range(13)
)
# ALPHA: str.isalpha. LOWER, UPPER: letters of that case, and all of a script without case. DIGIT: 0 to 9. NOT_SYMBOL: outside datatrove's
# punctuation. NOT_PUNCTUATION: outside the Unicode category P. PREFIX, SUFFIX: split off at the begin and end of a word. DOT_FOLLOWS: a dot
# behind it is a full stop. ICON: pictures and signs, split off everywhere.
INERT = np.uint16(1 << 15)  # letters and marks: never split off, wherever they stand

LIMIT = 0x40000  # the planes that hold text; code points above count as the last one below
_AFFIXES = ",:;!?()[]{}<>_#*&'\"`´¡¿·"
_SENTENCE_ENDS = "!.?։؟۔܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？｡。"


@functools.cache
def flags() -> np.ndarray:
    """The flags of each code point: uint16 [LIMIT]."""
    return np.fromiter((_flags(chr(point)) for point in range(LIMIT)), np.uint16, LIMIT)


@functools.cache
def folded() -> np.ndarray:
    """Each code point as a search engine would have it: uint32 [LIMIT], lower case without diacritics, any digit as 0, 0 for a mark to drop."""
    return np.fromiter((_fold(chr(point)) for point in range(LIMIT)), np.uint32, LIMIT)


def code_points(text: str) -> np.ndarray:
    """uint32 [len(text)]; lone surrogates are code points like others."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _flags(char: str) -> int:
    if char.isspace():
        return SPACE
    category = unicodedata.category(char)
    found = NOT_SYMBOL * (char not in PUNCTUATION_SET) | NOT_PUNCTUATION * (category[0] != "P")
    if char.isalpha():
        uncased = not (char.islower() or char.isupper())
        lower, upper = char.islower() or uncased, char.isupper() or uncased
        return found | ALPHA | INERT | (LOWER | DOT_FOLLOWS) * lower | UPPER * upper
    if category[0] == "M":
        return found | INERT
    is_affix = char in _AFFIXES or (not char.isascii() and category in ("Pi", "Pf", "Ps", "Pe", "Po"))
    return (
        found
        | DIGIT * (char in "0123456789")
        | ENDS_SENTENCE * (char in _SENTENCE_ENDS)
        | ICON * (category == "So" or char == "…")
        | PREFIX * (is_affix or char in "§%=—–" or category in ("Sc", "So"))
        | SUFFIX * (is_affix or char in "—–" or category == "So")
        | DOT_FOLLOWS * (is_affix or char in "0123456789%²-+|")
        | CURRENCY * (category == "Sc")
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
