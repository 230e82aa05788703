"""Where words begin and end: spaCy's rules for English, vectorised. Looks at the few code points of a text that are neither letters nor space.

A chunk is what stands between white space. Punctuation comes off its begin and its end one sign at a time; what is left, the core, is cut
at signs between letters or digits ("well-known", "and/or"), before contractions ("is|n't", "it|'s") and before units ("5|km").
"""

import functools
import re

import numpy as np

from herd_jax.curation import characters
from herd_jax.curation.characters import ALPHA, CURRENCY, DIGIT, DOT_FOLLOWS, ICON, INERT, LIMIT, LOWER, PREFIX, SPACE, SUFFIX, UPPER
from herd_jax.curation.rolling_hash import SpanHashes

_DOT, _HYPHEN, _PLUS, _PERCENT, _APOSTROPHE, _RIGHT_QUOTE = (np.uint32(ord(sign)) for sign in ".-+%'’")
_ABBREVIATIONS = (
    "Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. Calif. Co. Colo. Conn. Corp. Dec. Del. Dr. Feb. Fla. Ga. Gen. Gov. Ia. Id. Ill. Inc. Ind. Jan. Jr. "
    "Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. Messrs. Mich. Minn. Miss. Mo. Mont. Mr. Mrs. Ms. Mt. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. "
    "Pa. Prof. Rep. Rev. Sen. Sep. Sept. St. Tenn. Va. Wash. Wis. a.m. co. e.g. E.g. i.e. I.e. p.m. v.s. vs. "
    "a. b. c. d. e. f. g. h. i. j. k. l. m. n. o. p. q. r. s. t. u. v. w. x. y. z. ä. ö. ü."
)  # fmt: skip
_UNITS = "km m dm cm mm ha µm nm yd in ft kg g mg µg t lb oz kmh mph hPa Pa mbar mb MB kb KB gb GB tb TB T G M K am pm"
_CONTRACTIONS = "s S m ll ve re d"  # behind an apostrophe
# A host with a domain, with a scheme or a user before it, a port or a path behind it: one word whatever signs are in it.
_URL = re.compile(r"(?:[\w+.-]{2,}://)?(?:[^\s@]+@)?(?:[^\W_](?:[\w-]{0,62}[^\W_])?\.)+(?:[^\W\d_A-Z]{2,63}|\d{1,3})(?::\d{2,5})?(?:[/?#]\S*)?")
_LONGEST_URL = 2048


def word_bounds(text: str, points: np.ndarray, kinds: np.ndarray, spans: SpanHashes) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the words of a text of T code points: `points` uint32 [T], their flags `kinds` uint16 [T], hashes of its spans."""
    is_word = (kinds & SPACE) == 0
    cuts = np.ones(len(kinds) + 1, bool)
    np.not_equal(is_word[1:], is_word[:-1], out=cuts[1:-1])
    signs = np.flatnonzero((kinds & (INERT | SPACE)) == 0)
    if len(signs):
        _cut_at_signs(text, points, kinds, spans, signs, cuts, is_word)
    return np.flatnonzero(cuts[:-1] & is_word), np.flatnonzero(cuts[1:] & is_word) + 1


def _cut_at_signs(text, points, kinds, spans, at, cuts, is_word) -> None:
    """Sets `cuts` [T + 1] before and behind the signs that stand `at` these positions (int64 [E], digits among them), by the rules above."""
    padded = np.full(len(kinds) + 4, SPACE)
    padded[2:-2] = kinds
    sign, kind, before, after = points[at], kinds[at], padded[at + 1], padded[at + 3]
    chunk_starts, chunk_ends = np.flatnonzero(cuts[:-1] & is_word), np.flatnonzero(cuts[1:] & is_word) + 1
    chunk = np.searchsorted(chunk_starts, at, side="right") - 1

    touches = at[1:] == at[:-1] + 1
    is_dot = sign == _DOT
    joined = touches & is_dot[1:] & is_dot[:-1]
    is_ellipsis = np.zeros(len(at), bool)
    is_ellipsis[1:] |= joined
    is_ellipsis[:-1] |= joined

    leads = ((kind & PREFIX) != 0) | is_ellipsis | ((sign == _PLUS) & ((after & DIGIT) == 0))
    leads &= _runs_from(before == SPACE, touches & leads[:-1])
    core_starts = chunk_starts.copy()
    core_starts[chunk[leads]] = at[leads] + 1

    is_stop = is_dot & (((before & DOT_FOLLOWS) != 0) | ((before & padded[at] & UPPER) != 0))
    stops = np.flatnonzero(is_stop)
    is_stop[stops] &= ~_is_one_of(spans.of(np.minimum(core_starts[chunk[stops]], at[stops]), at[stops] + 1), _ABBREVIATIONS)
    behind_digit = ((before & DIGIT) != 0) & (((kind & CURRENCY) != 0) | (sign == _PERCENT) | (sign == _PLUS))
    trails = ((kind & SUFFIX) != 0) | is_ellipsis | is_stop | behind_digit
    trails &= _runs_from((after == SPACE)[::-1], (touches & trails[1:])[::-1])[::-1]
    core_ends = chunk_ends.copy()
    core_ends[chunk[trails][::-1]] = at[trails][::-1]

    before_mask, after_mask = _infix_masks()
    point = np.minimum(sign, LIMIT - 1)
    inside = ~(leads | trails)
    cut = ((before & before_mask[point]) != 0) & ((after & after_mask[point]) != 0)
    cut |= is_ellipsis | ((sign == _HYPHEN) & ((before & after & DIGIT) != 0))
    cut &= inside
    if (cut & inside).any():
        cut &= ~_in_url(text, chunk, cut, is_dot & inside, core_starts, core_ends)
    cut |= ~inside
    cuts[at[cut]] = True
    cuts[at[cut] + 1] = True
    cuts[at[1:][joined]] = False

    is_dash = sign == _HYPHEN
    double = np.flatnonzero(touches & is_dash[1:] & is_dash[:-1])
    double = double[((before[double] & (ALPHA | DIGIT)) != 0) & ((after[double + 1] & ALPHA) != 0)]
    cuts[at[double]] = True
    cuts[at[double] + 2] = True

    core_end = core_ends[chunk]
    tail_at = np.flatnonzero(((kind & DIGIT) != 0) & ((after & ALPHA) != 0))
    tail_at = tail_at[_is_one_of(spans.of(at[tail_at] + 1, core_end[tail_at]), _UNITS)]
    cuts[at[tail_at] + 1] = True
    quote = np.flatnonzero(inside & ((sign == _APOSTROPHE) | (sign == _RIGHT_QUOTE)))
    rest = spans.of(at[quote] + 1, core_end[quote])
    cuts[at[quote[_is_one_of(rest, _CONTRACTIONS)]]] = True
    negated = at[quote[_is_one_of(rest, "t")]]
    cuts[negated[points[negated - 1] == ord("n")] - 1] = True


def _runs_from(begins: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """bool [E]: the elements that a run reaches which began at one of `begins` [E]; element i + 1 goes on with i's run if `continues[i]`."""
    firsts = np.arange(len(begins))
    firsts[1:][continues] = 0
    return begins[np.maximum.accumulate(firsts)]


def _in_url(text, chunk, cut, dots, core_starts, core_ends) -> np.ndarray:
    """bool [E]: the signs in chunks whose core is a URL; only those with a sign to `cut` at and with a dot are looked at."""
    found = np.zeros(len(core_starts), bool)
    for index in np.intersect1d(chunk[cut], chunk[dots]):
        begin, end = core_starts[index], core_ends[index]
        found[index] = end - begin <= _LONGEST_URL and _URL.fullmatch(text, begin, end) is not None
    return found[chunk]


def _is_one_of(hashes: np.ndarray, words: str) -> np.ndarray:
    known = _known(words)
    return known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes


@functools.cache
def _known(words: str) -> np.ndarray:
    """The sorted hashes of words that a space separates."""
    starts = np.array([match.start() for match in re.finditer(r"\S+", words)])
    ends = np.array([match.end() for match in re.finditer(r"\S+", words)])
    return np.sort(SpanHashes(characters.code_points(words)).of(starts, ends))


@functools.cache
def _infix_masks() -> tuple[np.ndarray, np.ndarray]:
    """A sign cuts a core where the code points before and behind it have one of these flags: two uint16 [LIMIT]."""
    masks = np.zeros((2, LIMIT), np.uint16)
    for sign in "-–—~:<>=/":
        masks[:, ord(sign)] = ALPHA | DIGIT, ALPHA
    for sign in "+*^":
        masks[:, ord(sign)] = DIGIT, DIGIT
    masks[:, ord(",")] = ALPHA, ALPHA
    masks[:, ord(".")] = LOWER, UPPER
    masks[:, (characters.flags() & ICON) != 0] = 0xFFFF
    return masks[0], masks[1]
