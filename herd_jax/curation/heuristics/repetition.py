"""Text that repeats itself: Gopher's rules (Rae et al. 2021, table A1), among them duplicated n-gram coverage (paper, section 3.1.1)."""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
from datatrove.data import Document

from herd_jax.curation.heuristics.prose import ProseBlock, check_fractions
from herd_jax.curation.text import words

_PARAGRAPH_END = re.compile(r"\n{2,}")
_LINE_END = re.compile(r"\n+")
_FIRST_TOP_N, _FIRST_DUPLICATE_N = 2, 5
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class RepetitionConfig:
    """Largest fractions of a document: of its paragraphs and lines (by number, by characters) that are copies of earlier ones; of its
    characters that its most frequent n-gram makes up, n = 2, 3, ...; that copies of earlier n-grams make up, n = 5, 6, ...

    None: no limit.
    """

    paragraphs: float | None = 0.3
    paragraph_characters: float | None = 0.2
    lines: float | None = 0.3
    line_characters: float | None = 0.2
    top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def __post_init__(self):
        names = ("paragraphs", "paragraph_characters", "lines", "line_characters")
        check_fractions("repetition", {name: getattr(self, name) for name in names})
        for name in ("top_ngrams", "duplicate_ngrams"):
            check_fractions("repetition", {f"{name}[{index}]": limit for index, limit in enumerate(getattr(self, name))})


class Repetition(ProseBlock):
    """Verdicts, reasons and their order are those of datatrove's GopherRepetitionFilter. Memory: 80 bytes a word."""

    name = "repetition"

    def judge(self, doc: Document, settings: RepetitionConfig) -> bool | tuple[bool, str]:
        text = doc.text
        if not text:
            return False, "empty"
        paragraphs = _PARAGRAPH_END.split(text.strip())
        copies, characters = duplicates(paragraphs)
        if _exceeds(copies, len(paragraphs), settings.paragraphs):
            return False, "dup_para_frac"
        if _exceeds(characters, len(text), settings.paragraph_characters):
            return False, "dup_para_char_frac"
        lines = _LINE_END.split(text)
        copies, characters = duplicates(lines)
        if _exceeds(copies, len(lines), settings.lines):
            return False, "dup_line_frac"
        if _exceeds(characters, len(text), settings.line_characters):
            return False, "dup_line_char_frac"
        reason = _judge_ngrams(words.split(text), len(text), settings)
        return (False, reason) if reason else True


def duplicates(parts: list[str]) -> tuple[int, int]:
    """Returns how many parts are copies of earlier ones, and their characters."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0, 0
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


def _exceeds(part: int, whole: int, limit: float | None) -> bool:
    return limit is not None and part / whole > limit


def _judge_ngrams(found: words.Words, num_characters: int, settings: RepetitionConfig) -> str | None:
    before = np.concatenate([[0], np.cumsum(found.lengths)])  # characters of the words before each
    for n, at, grams in _repeated_ngrams(found.hashes):
        top, duplicate = n - _FIRST_TOP_N, n - _FIRST_DUPLICATE_N
        is_last = top >= len(settings.top_ngrams) and duplicate >= len(settings.duplicate_ngrams)
        if is_last or (n >= _FIRST_DUPLICATE_N and top >= len(settings.top_ngrams) and not len(at)):
            return None
        if top < len(settings.top_ngrams):
            first, count = _most_frequent(at, grams)
            characters = int(before[first + n] - before[first]) + n - 1  # a space between its words
            if count * characters / num_characters > settings.top_ngrams[top]:
                return f"top_{n}_gram"
        if 0 <= duplicate < len(settings.duplicate_ngrams):
            limit = settings.duplicate_ngrams[duplicate] * num_characters
            if len(at) and _copies_exceed(at, grams, before[at + n] - before[at], n, limit):
                return f"duplicated_{n}_n_grams"
    return None


def _repeated_ngrams(hashes: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields n = 2, 3, ... as far as there are n-grams, with the positions (ascending) and hashes of those that occur more than once.

    Those of n + 1 words are looked for where those of n words are: few positions are left soon.
    """
    at, grams = np.arange(len(hashes)), hashes
    for n in range(2, len(hashes) + 1):
        at = at[: at.searchsorted(len(hashes) - n, side="right")]
        if len(at):
            grams = grams[: len(at)] * _BASE + hashes[at + (n - 1)]
            order = grams.argsort()
            ordered = grams[order]
            equal = ordered[1:] == ordered[:-1]
            repeated = np.zeros(len(at), bool)
            repeated[order[1:][equal]] = True
            repeated[order[:-1][equal]] = True
            at, grams = at[repeated], grams[repeated]
        yield n, at, grams


def _most_frequent(at: np.ndarray, grams: np.ndarray) -> tuple[int, int]:
    """Returns the position of the first occurrence and the number of occurrences of the most frequent n-gram, of those the one that comes first."""
    if not len(at):
        return 0, 1
    ordered = np.sort(grams)
    bounds = np.concatenate([[0], (ordered[1:] != ordered[:-1]).nonzero()[0] + 1, [len(ordered)]])
    counts = np.diff(bounds)
    most = counts.max()
    tied = ordered[bounds[:-1][counts == most]]
    is_tied = tied.take(tied.searchsorted(grams), mode="clip") == grams
    return int(at[is_tied.argmax()]), int(most)


def _copies_exceed(at: np.ndarray, grams: np.ndarray, lengths: np.ndarray, n: int, limit: float) -> bool:
    """Returns whether n-grams seen before make up more than `limit` characters; read from the left, one that overlaps such a copy is not seen."""
    seen, end, characters = set(), 0, 0
    for position, gram, length in zip(at.tolist(), grams.tolist(), lengths.tolist(), strict=True):
        if position >= end:
            if gram in seen:
                end = position + n
                characters += length
                if characters > limit:
                    return True
            else:
                seen.add(gram)
    return False
