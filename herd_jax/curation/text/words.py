"""The words of a text, found once and shared by the blocks: where they stand, what kind they are, their hashes (paper, section 3.1.1).

Words are cut as spaCy's rules for English cut them, nearly: datatrove's Gopher, C4 and FineWeb filters count such words. So at white space,
with punctuation off both ends, and inside at hyphens, slashes, dashes between letters. All arithmetic is numpy over code points.
"""

import dataclasses
import functools
import unicodedata

import numpy as np

from herd_jax.curation.text import characters
from herd_jax.curation.text.boundaries import MARGIN, word_bounds
from herd_jax.curation.text.characters import ALPHA, NOT_SYMBOL
from herd_jax.curation.text.rolling_hash import SpanHashes, mix, ngrams

__all__ = ["Words", "ngrams", "split"]

_PIECE = 1 << 16  # code points that are cut and hashed at a time; no word is longer
_ZERO = np.uint32(ord("0"))


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """The words of `text`. `starts`, `ends`: int64 [n], code point offsets in `text`; `hashes`: uint64 [n], as written; `kinds`: uint16 [n],
    the flags of `characters` that any character of the word has."""

    text: str
    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray
    kinds: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Returns the characters of each word: int64 [n]."""
        return self.ends - self.starts

    @functools.cached_property
    def is_symbol(self) -> np.ndarray:
        """Returns which words are punctuation only: bool [n]."""
        return (self.kinds & NOT_SYMBOL) == 0

    @functools.cached_property
    def has_alpha(self) -> np.ndarray:
        """Returns which words have a letter: bool [n]."""
        return (self.kinds & ALPHA) != 0

    @functools.cached_property
    def folded(self) -> np.ndarray:
        """Returns the hashes of the words that are not symbols, whatever their case, accents and width: uint64 [m]."""
        return self._folded(digits=True)

    @functools.cached_property
    def folded_without_digits(self) -> np.ndarray:
        """Returns what `folded` does, with each run of digits as one 0: uint64 [m]."""
        return self._folded(digits=False)

    def _folded(self, digits: bool) -> np.ndarray:
        kept = ~self.is_symbol
        starts, ends, first = self.starts[kept], self.ends[kept], 0
        found = [np.empty(0, np.uint64)]
        for begin, end in _pieces(self.text):
            last = int(np.searchsorted(starts, end))
            found.append(_folded(self.text[begin:end], starts[first:last] - begin, ends[first:last] - begin, digits))
            first = last
        return np.concatenate(found)


@functools.lru_cache(maxsize=2)
def split(text: str) -> Words:
    """Returns the words of `text`; the last two texts are remembered (one as read, one cleaned).

    Memory: 26 bytes a word and a few MB, so at most 26 bytes for each code point (all signs), 5 in prose.
    """
    found = [_split_piece(text[begin:end], begin) for begin, end in _pieces(text)]
    if len(found) == 1:
        return Words(text, *found[0])
    empty = tuple(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.uint64, np.uint16))
    return Words(text, *(np.concatenate(arrays) for arrays in zip(empty, *found, strict=True)))


def _pieces(text: str) -> list[tuple[int, int]]:
    """Returns spans of at most `_PIECE` that end behind white space where there is any."""
    spans, begin = [], 0
    while begin < len(text):
        end = begin + _PIECE
        if end < len(text):
            space = max(text.rfind(" ", begin, end), text.rfind("\n", begin, end))
            end = space + 1 if space > begin else end
        spans.append((begin, min(end, len(text))))
        begin = end
    return spans


def _split_piece(text: str, offset: int) -> tuple[np.ndarray, ...]:
    points = characters.code_points(text)
    kinds = characters.kinds_of(points, MARGIN)
    spans = SpanHashes(points)
    starts, ends = word_bounds(text, points, kinds, spans)
    word_kinds = np.bitwise_or.reduceat(kinds, starts + MARGIN) if len(starts) else np.empty(0, np.uint16)
    return starts + offset, ends + offset, mix(spans.of(starts, ends)), word_kinds


def _folded(text: str, starts: np.ndarray, ends: np.ndarray, digits: bool) -> np.ndarray:
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):  # accents may stand alone, and say more beside their letter
        found = [unicodedata.normalize("NFC", text[start:end]) for start, end in zip(starts.tolist(), ends.tolist())]
        ends = np.cumsum([len(word) for word in found], dtype=np.int64)
        starts, text = np.concatenate([[0], ends[:-1]]).astype(np.int64), "".join(found)
    points, places = characters.folding()(characters.code_points(text))
    starts, ends = places[starts], places[ends]
    hashes = SpanHashes(points).of(starts, ends)
    if not digits:
        at = (points - _ZERO < 10).nonzero()[0]  # of unsigned numbers
        holds = np.zeros(len(starts) + 1, bool)
        holds[starts.searchsorted(at, side="right")] = True
        found = holds[1:].nonzero()[0]
        hashes[found] = _without_digits(points, starts[found], ends[found])
    return mix(hashes)


def _without_digits(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the hashes of these words, each run of digits taken as one 0: uint64 [n]."""
    sizes = ends - starts
    places = np.concatenate([[0], np.cumsum(sizes)])
    points = points[np.repeat(starts - places[:-1], sizes) + np.arange(places[-1])]
    is_digit = points - _ZERO < 10
    kept = np.ones(len(points), bool)
    kept[1:] = ~(is_digit[1:] & is_digit[:-1])
    kept[places[:-1][sizes > 0]] = True
    places = np.concatenate([[0], np.cumsum(kept)])[places]
    return SpanHashes(np.where(is_digit, _ZERO, points)[kept]).of(places[:-1], places[1:])
