"""Text that is not prose: Gopher's quality rules (Rae et al. 2021, appendix A)."""

import dataclasses
import functools

import numpy as np
from datatrove.data import Document

from herd_jax.curation.heuristics.prose import ProseBlock, check_counts, check_fractions
from herd_jax.curation.text import words
from herd_jax.curation.text.characters import ALONE
from herd_jax.errors import UserError

_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


@dataclasses.dataclass(frozen=True)
class GopherQualityConfig:
    """Limits: words that are not symbols; their mean length in characters (not judged in scripts without spaces); hash signs or ellipses a word; fractions of the lines that begin
    with a bullet or end with an ellipsis, of the words with a letter; distinct stop words. None: no limit."""

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_symbols_per_word: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def __post_init__(self):
        counts = ("min_words", "max_words", "min_mean_word_length", "max_mean_word_length", "max_symbols_per_word", "min_stop_words")
        check_counts("quality", {name: getattr(self, name) for name in counts})
        names = ("max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words")
        check_fractions("quality", {name: getattr(self, name) for name in names})
        if (self.min_stop_words or 0) > len(self.stop_words):
            raise UserError(
                f"curation quality.min_stop_words is {self.min_stop_words} and quality.stop_words has {len(self.stop_words)}: "
                "name more words, or none for the minimum"
            )
        for word in self.stop_words:
            if len(words.split(word)) != 1:
                raise UserError(f"curation quality.stop_words has '{word}': each must be one word")


class GopherQuality(ProseBlock):
    """Verdicts, reasons and their order are those of datatrove's GopherQualityFilter."""

    name = "gopher_quality"

    def judge(self, doc: Document, settings: GopherQualityConfig) -> bool | tuple[bool, str]:
        text, found = doc.text, words.split(doc.text)
        num_words = len(found)
        lengths = found.lengths[~found.is_symbol]
        if _below(len(lengths), settings.min_words) or not len(lengths):
            return False, "gopher_short_doc"
        if _above(len(lengths), settings.max_words):
            return False, "gopher_long_doc"
        mean_length = _mean_length(found)
        if mean_length is not None and _below(mean_length, settings.min_mean_word_length):
            return False, "gopher_below_avg_threshold"
        if mean_length is not None and _above(mean_length, settings.max_mean_word_length):
            return False, "gopher_above_avg_threshold"
        if _above(text.count("#") / num_words, settings.max_symbols_per_word):
            return False, "gopher_too_many_hashes"
        if _above(sum(map(text.count, _ELLIPSES)) / num_words, settings.max_symbols_per_word):
            return False, "gopher_too_many_ellipsis"
        lines = text.splitlines()
        if _above(sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines), settings.max_bullet_lines):
            return False, "gopher_too_many_bullets"
        if _above(sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines), settings.max_ellipsis_lines):
            return False, "gopher_too_many_end_ellipsis"
        if _below(np.count_nonzero(found.has_alpha) / num_words, settings.min_alphabetic_words):
            return False, "gopher_below_alpha_threshold"
        if settings.min_stop_words and not _has_stop_words(found.hashes, settings.stop_words, settings.min_stop_words):
            return False, "gopher_enough_stop_words"
        return True


def _mean_length(found: words.Words) -> float | None:
    """Returns the mean length of the words between spaces; None where characters of scripts without spaces outnumber them."""
    lengths = found.lengths[((found.kinds & ALONE) == 0) & ~found.is_symbol]
    return int(lengths.sum()) / len(lengths) if 2 * len(lengths) >= np.count_nonzero(~found.is_symbol) else None


def _below(value: float, limit: float | None) -> bool:
    return limit is not None and value < limit


def _above(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _has_stop_words(hashes: np.ndarray, stop_words: tuple[str, ...], minimum: int) -> bool:
    """Returns whether `minimum` different ones of the stop words are among the words."""
    found = 0
    for stop_word in _hashes(stop_words):
        found += bool((hashes == stop_word).any())
        if found >= minimum:
            return True
    return False


@functools.cache
def _hashes(stop_words: tuple[str, ...]) -> np.ndarray:
    return words.split(" ".join(stop_words)).hashes
