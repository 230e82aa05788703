"""Classes of Unicode code points as bit flags in one table, so that a rule about characters is one numpy expression over a text."""

import dataclasses
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
_UNSPACED = re.compile(  # Thai, Lao, Burmese, Khmer, Tai, Balinese, Javanese; kana, bopomofo, Yi, Han
    "[\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf\u1b00-\u1b7f\ua980-\ua9df"
    "\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\ua000-\ua48f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_SEPARATORS = "\u0f0b\u0f0c\u1361"  # stand between the syllables of Tibetan, between the words of Ethiopic
_ACCENTS = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f\ufe00-\ufe0f\u00ad\u200b-\u200d\u2060\ufeff]")  # and what has no width
_OTHER_SCRIPT = re.compile("[\u0370-\u1fff\u2d00-\u2dff\ua4d0-\uabff\U00010000-\U0001ffff]")
_LONGEST_FORM = 8  # code points; two ligatures of Arabic have more
_SENTENCE_ENDS = "!.?։؟۔܀܁܂߹।॥།༎༏༐༑༔၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？｡。"


@functools.cache
def flags() -> np.ndarray:
    """Returns the flags of each code point: uint16 [LIMIT]."""
    return np.fromiter((_flags(chr(point)) for point in range(LIMIT)), np.uint16, LIMIT)


@dataclasses.dataclass(frozen=True)
class Folding:
    """The folded form of each code point: `sizes` [LIMIT] (uint8) code points from `begins` [LIMIT] on in `values`, both uint32; the first
    of them is in `firsts` [LIMIT]."""

    sizes: np.ndarray
    begins: np.ndarray
    firsts: np.ndarray
    values: np.ndarray

    def __call__(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the folded code points of `points` [T], and where the form of each begins among them: int64 [T + 1]."""
        sizes = self.sizes.take(points, mode="clip")
        if (sizes == 1).all():
            return self.firsts.take(points, mode="clip"), np.arange(len(points) + 1)
        places = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        begins = self.begins.take(points, mode="clip")
        return self.values[np.repeat(begins - places[:-1], sizes) + np.arange(places[-1])], places


@functools.cache
def folding() -> Folding:
    """Returns the folding to what differs in no more than case, accents, width and the like, digits as 0 to 9 of the ASCII.

    It is Unicode's case folding in the compatible decomposition, so a character may become several (`ß` and `ss`, a syllable of Hangul and its
    letters). The accents of Latin, Greek and Cyrillic letters go; marks that make another letter stay, such as those of kana.
    """
    forms = [_fold(chr(point)) for point in range(LIMIT)]
    sizes = np.array([len(form) for form in forms], np.uint8)
    begins, values = (np.cumsum(sizes, dtype=np.uint32) - sizes).astype(np.uint32), code_points("".join(forms))
    return Folding(sizes, begins, values.take(begins, mode="clip"), values)


def code_points(text: str) -> np.ndarray:
    """Returns uint32 [len(text)]; lone surrogates are code points like others."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def kinds_of(points: np.ndarray, margin: int = 0) -> np.ndarray:
    """Returns the flags of code points `points` [T], with so many spaces before and behind them: uint16 [T + 2 * margin]."""
    kinds = np.full(len(points) + 2 * margin, SPACE)
    flags().take(points, mode="clip", out=kinds[margin : margin + len(points)])
    return kinds


def _flags(char: str) -> int:
    if char.isspace() or char in _SEPARATORS:
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
    is_bracket_or_end = not char.isascii() and (category in ("Pi", "Pf", "Ps", "Pe") or char in _SENTENCE_ENDS)
    is_affix = char in _AFFIXES or is_bracket_or_end or (category == "Po" and _OTHER_SCRIPT.match(char) is not None)
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


def _fold(char: str) -> str:
    if char in "’ʼ＇":
        return "'"
    if char in "йЙўЎ":  # letters of their own, which a breve makes
        return char.lower()
    form = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
    kept = (each for each in form if not _ACCENTS.match(each))
    return "".join(str(unicodedata.digit(each)) if each.isdigit() else each for each in kept)[:_LONGEST_FORM]
