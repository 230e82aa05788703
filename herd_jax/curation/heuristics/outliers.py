"""Documents whose words are not those of their language: Kullback-Leibler divergence from the corpus (section 3.1.1 of the paper).

A first pass counts the words of each language (`word_counts.py`), and the block reads the sums. Words are hashed to bins.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from datatrove.data import Document

from herd_jax.curation.block import Block
from herd_jax.curation.heuristics.prose import CODE, check_counts
from herd_jax.curation.text import words

BINS = 1 << 16
_LONGEST_SAMPLE = 1 << 16  # words; longer documents are compared with a sample of so many


@dataclasses.dataclass(frozen=True)
class OutliersConfig:
    """A document goes if its divergence from the words of its language exceeds by more than `max_excess` nats that of words drawn from the
    language at random, as many as it has. Below `min_words` it is not judged."""

    max_excess: float = 3.0  # nats that a document's divergence may exceed that of random words by
    min_words: int = 50  # below which a document is not judged

    def __post_init__(self):
        check_counts("outliers", {"max_excess": self.max_excess, "min_words": self.min_words})


def add_words(counts: np.ndarray, found: words.Words) -> None:
    """Adds the words of a document to int64 [BINS], how many words of the corpus fall in each bin."""
    np.add.at(counts, _bins(found), 1)


class Outliers(Block):
    """Drops documents with too many words that are rare in their language. A short document diverges from any corpus, for want of words: so
    what counts is the divergence beyond that of a random sample of the same length, whose expectation is 0 at every length.

    `counts` is what `word_counts.SumWords` wrote; languages that it lacks are not judged. Memory: 1.5 MB a language.
    """

    name = "outliers"

    def __init__(self, settings: OutliersConfig, counts: Path):
        super().__init__()
        self.settings, self._counts = settings, counts

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        language = doc.metadata["language"]
        if doc.metadata["media_type"] == CODE or language not in self._languages:
            return True
        found = words.split(doc.text)
        if len(found.folded_without_digits) < max(self.settings.min_words, 1):
            return True
        excess = self._language(language).excess(found)
        return True if excess <= self.settings.max_excess else (False, "outlier_words")

    @functools.cached_property
    def _languages(self) -> dict[str, np.ndarray]:
        with np.load(self._counts) as counts:
            return {language: counts[language] for language in counts.files if counts[language].any()}

    @functools.cache  # noqa: B019  (a block lives as long as its process)
    def _language(self, language: str) -> "LanguageWords":
        return LanguageWords(self._languages[language])


class LanguageWords:
    """The distribution of a language's words over the bins."""

    def __init__(self, counts: np.ndarray):
        self._probabilities = counts / counts.sum()
        self._surprise = -np.log((counts + 0.5) / (counts.sum() + 0.5 * BINS))  # of a word in a bin, those never seen among them

    def excess(self, found: words.Words) -> float:
        """Returns the nats by which the words diverge more from the language than a sample of the language of the same length does."""
        return self._divergence(_bins(found)) - self._expected(len(found.folded_without_digits))

    def _divergence(self, bins: np.ndarray) -> float:
        """Returns the sum of p log(p / q): p the fraction of the words in a bin, q the language's."""
        _, counts = np.unique(bins, return_counts=True)
        return float(self._surprise[bins].mean() + (counts * np.log(counts / len(bins))).sum() / len(bins))

    def _expected(self, num_words: int) -> float:
        """Returns the divergence of a random sample: measured at powers of two, straight lines between them."""
        size = min(max(num_words, 1), _LONGEST_SAMPLE)
        power = size.bit_length() - 1
        low, high = self._sampled(power), self._sampled(power + 1)
        return low + (high - low) * (size / (1 << power) - 1)

    @functools.cache  # noqa: B019
    def _sampled(self, power: int) -> float:
        size, draws = 1 << power, max(4, 256 >> power)
        samples = np.random.default_rng(power).choice(BINS, (draws, size), p=self._probabilities)
        return float(np.mean([self._divergence(sample) for sample in samples]))


def _bins(found: words.Words) -> np.ndarray:
    return (found.folded_without_digits & np.uint64(BINS - 1)).astype(np.int64)
