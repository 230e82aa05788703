"""Where words begin and end: spaCy's rules for English, vectorised. They look at the few code points that are neither letters nor space.

A chunk is what stands between white space. Punctuation comes off its begin and its end one sign at a time; what is left, the core, is cut
at signs between letters or digits ("well-known", "and/or"), before contractions ("is|n't", "it|'s") and before units ("5|km").
"""

import functools
import re

import numpy as np

from herd_jax.curation.text import characters
from herd_jax.curation.text.characters import (
    AFTER_DIGIT,
    ALONE,
    ALPHA,
    APOSTROPHE,
    DIGIT,
    DOT_FOLLOWS,
    ICON,
    INERT,
    LIMIT,
    LOWER,
    PREFIX,
    SPACE,
    SUFFIX,
    UPPER,
)
from herd_jax.curation.text.rolling_hash import SpanHashes

MARGIN = 2  # code points that are read before and behind a text
_DOT, _HYPHEN, _PLUS = (np.uint32(ord(sign)) for sign in ".-+")
_ABBREVIATIONS = (
    "Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. Calif. Co. Colo. Conn. Corp. Dec. Del. Dr. Feb. Fla. Ga. Gen. Gov. Ia. Id. Ill. Inc. Ind. "
    "Jan. Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. Messrs. Mich. Minn. Miss. Mo. Mont. Mr. Mrs. Ms. Mt. Neb. Nebr. Nev. Nov. "
    "Oct. Okla. Ore. Pa. Prof. Rep. Rev. Sen. Sep. Sept. St. Tenn. Va. Wash. Wis. a.m. co. e.g. E.g. i.e. I.e. p.m. v.s. vs. "
    "a. b. c. d. e. f. g. h. i. j. k. l. m. n. o. p. q. r. s. t. u. v. w. x. y. z. ä. ö. ü."
)  # fmt: skip
_UNITS = "km m dm cm mm ha µm nm yd in ft kg g mg µg t lb oz kmh mph hPa Pa mbar mb MB kb KB gb GB tb TB T G M K am pm"
_CONTRACTIONS = "s S m ll ve re d"  # behind an apostrophe
# A host with a domain, with a scheme or a user before it, a port or a path behind it: one word whatever signs are in it.
_URL = re.compile(
    r"(?:[\w+.-]{2,}://)?(?:[^\s@]+@)?(?:[^\W_](?:[\w-]{0,62}[^\W_])?\.)+(?:[^\W\d_A-Z]{2,63}|\d{1,3})(?::\d{2,5})?(?:[/?#]\S*)?"
)
_LONGEST_URL = 2048
_FACES = np.array(
    sorted(ord(first) << 16 | ord(second) for first, second in "): :) (: :( :* =) (= ;) (; [: :] =] [= ''".split()) + [2**32 - 1], np.uint32
)


def word_bounds(text: str, points: np.ndarray, kinds: np.ndarray, spans: SpanHashes) -> tuple[np.ndarray, np.ndarray]:
    """Returns the starts and ends of the words of a text of T code points `points` [T] (uint32), whose spans `spans` hashes.

    `kinds` are its flags with `MARGIN` spaces before and behind: uint16 [T + 4].
    """
    is_word = (kinds & SPACE) == 0
    cuts = is_word[MARGIN:-1] != is_word[MARGIN - 1 : -MARGIN]  # [T + 1], before each code point and at the end
    edges = cuts.nonzero()[0]
    if (kinds & ALONE).any():
        _cut_around_characters(kinds[MARGIN:-MARGIN], cuts)
    signs = ((kinds & (INERT | SPACE)) == 0).nonzero()[0] - MARGIN
    if len(signs):
        _cut_at_signs(text, points, kinds, spans, signs, edges[::2], edges[1::2], cuts)
    edges = cuts.nonzero()[0]
    begins_word = is_word[edges + MARGIN]
    return edges[begins_word], edges[1:][begins_word[:-1]]


def _cut_around_characters(kinds: np.ndarray, cuts: np.ndarray) -> None:
    """Sets `cuts` so that in scripts without spaces each character is a word, with the marks behind it."""
    is_alone = (kinds & ALONE) != 0
    is_mark = (kinds & (INERT | ALPHA)) == INERT
    cuts[:-1] |= is_alone
    cuts[1:-1] |= is_alone[:-1] & ~is_mark[1:]


def _cut_at_signs(text, points, kinds, spans, at, chunk_starts, chunk_ends, cuts) -> None:
    """Sets `cuts` around the signs `at` these positions (int64 [E], digits among them) in chunks with these bounds, by the rules above."""
    sign, kind, second_before, before, after = points[at], kinds[at + 2], kinds[at], kinds[at + 1], kinds[at + 3]
    chunk = chunk_starts.searchsorted(at, side="right") - 1
    touches = at[1:] == at[:-1] + 1
    pairs = touches.nonzero()[0]  # the first of two signs side by side
    is_dot = sign == _DOT
    dots = pairs[is_dot[pairs] & is_dot[pairs + 1]]
    is_ellipsis = np.zeros(len(at), bool)
    is_ellipsis[dots] = is_ellipsis[dots + 1] = True

    leads = ((kind & PREFIX) != 0) | is_ellipsis | ((sign == _PLUS) & ((after & DIGIT) == 0))
    leads &= _runs_from(before == SPACE, touches & leads[:-1])
    core_starts = chunk_starts.copy()
    core_starts[chunk[leads]] = at[leads] + 1

    trails = ((kind & SUFFIX) != 0) | is_ellipsis | (((kind & AFTER_DIGIT) != 0) & ((before & DIGIT) != 0))
    stops = (is_dot & (((before & DOT_FOLLOWS) | (before & second_before & UPPER)) != 0)).nonzero()[0]
    trails[stops] |= ~_is_one_of(spans, np.minimum(core_starts[chunk[stops]], at[stops]), at[stops] + 1, _ABBREVIATIONS)
    trails &= _runs_from((after == SPACE)[::-1], (touches & trails[1:])[::-1])[::-1]
    core_ends = chunk_ends.copy()
    core_ends[chunk[trails][::-1]] = at[trails][::-1]

    inside = ~(leads | trails)
    before_mask, after_mask = _infix_masks()
    infix = ((before & before_mask.take(sign, mode="clip")) != 0) & ((after & after_mask.take(sign, mode="clip")) != 0)
    infix = (inside & (infix | is_ellipsis | ((sign == _HYPHEN) & ((before & after & DIGIT) != 0)))).nonzero()[0]
    if len(infix):
        infix = infix[~_in_url(text, chunk[infix], chunk[inside & is_dot], core_starts, core_ends)]
    for alone in (at[~inside], at[infix]):
        cuts[alone] = True
        cuts[alone + 1] = True
    cuts[at[dots] + 1] = False
    _join_and_cut_pairs(sign, at, before, after, pairs, inside, cuts)
    _cut_units(spans, at, (((kind & DIGIT) != 0) & ((after & ALPHA) != 0)).nonzero()[0], core_ends[chunk], cuts)
    _cut_contractions(spans, points, at, (inside & ((kind & APOSTROPHE) != 0)).nonzero()[0], core_ends[chunk], cuts)


def _join_and_cut_pairs(sign, at, before, after, pairs, inside, cuts) -> None:
    """Changes `cuts` so that faces such as ":)" stay one word; a double hyphen between words is one."""
    first, second = sign[pairs], sign[pairs + 1]
    code = first << np.uint32(16) | second
    faces = pairs[(_FACES[_FACES.searchsorted(code)] == code) & ~inside[pairs] & ~inside[pairs + 1]]
    cuts[at[faces] + 1] = False
    dashes = pairs[(first == _HYPHEN) & (second == _HYPHEN)]
    dashes = dashes[((before[dashes] & (ALPHA | DIGIT)) != 0) & ((after[dashes + 1] & ALPHA) != 0)]
    cuts[at[dashes]] = cuts[at[dashes] + 2] = True


def _cut_units(spans, at, digits, core_ends, cuts) -> None:
    """Cuts between a digit that a letter follows and a unit that ends the core."""
    if len(digits):
        behind = at[digits] + 1
        cuts[behind[_is_one_of(spans, behind, core_ends[digits], _UNITS)]] = True


def _cut_contractions(spans, points, at, quotes, core_ends, cuts) -> None:
    """Cuts before the apostrophe of "it's", and before the n of "isn't"."""
    if len(quotes):
        quoted, ends = at[quotes], core_ends[quotes]
        cuts[quoted[_is_one_of(spans, quoted + 1, ends, _CONTRACTIONS)]] = True
        negated = quoted[_is_one_of(spans, quoted + 1, ends, "t") & (points[quoted - 1] == ord("n"))]
        cuts[negated - 1] = True


def _runs_from(begins: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """Returns bool [E]: which elements are in runs whose first is one of `begins` (bool [E]); element i + 1 goes on with i's run if
    `continues[i]`."""
    firsts = np.arange(len(begins))
    firsts[1:][continues] = 0
    return begins[np.maximum.accumulate(firsts)]


def _in_url(text, chunks_cut, chunks_with_dot, core_starts, core_ends) -> np.ndarray:
    """Returns bool: which of `chunks_cut` have a URL as their core; only those with a dot are looked at."""
    has_dot, is_url = np.zeros((2, len(core_starts)), bool)
    has_dot[chunks_with_dot] = True
    for index in np.unique(chunks_cut[has_dot[chunks_cut]]):
        begin, end = core_starts[index], core_ends[index]
        is_url[index] = end - begin <= _LONGEST_URL and _URL.fullmatch(text, begin, end) is not None
    return is_url[chunks_cut]


def _is_one_of(spans: SpanHashes, starts: np.ndarray, ends: np.ndarray, words: str) -> np.ndarray:
    known = _known(words)
    hashes = spans.of(starts, ends)
    return known[known.searchsorted(hashes)] == hashes


@functools.cache
def _known(words: str) -> np.ndarray:
    """Returns the sorted hashes of words that spaces separate, and a last one above all others."""
    starts, ends = np.array([match.span() for match in re.finditer(r"\S+", words)]).T
    return np.append(np.sort(SpanHashes(characters.code_points(words)).of(starts, ends)), np.iinfo(np.uint64).max)


@functools.cache
def _infix_masks() -> tuple[np.ndarray, np.ndarray]:
    """Returns two uint16 [LIMIT]: a sign cuts a core where the code points before and behind it have one of these flags."""
    masks = np.zeros((2, LIMIT), np.uint16)
    for sign in "-–—~:<>=/":
        masks[:, ord(sign)] = ALPHA | DIGIT, ALPHA
    for sign in "+*^":
        masks[:, ord(sign)] = DIGIT, DIGIT
    masks[:, ord(",")] = ALPHA, ALPHA
    masks[:, ord(".")] = LOWER, UPPER
    masks[:, (characters.flags() & ICON) != 0] = 0xFFFF
    return masks[0], masks[1]
