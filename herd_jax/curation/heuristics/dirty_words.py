"""Adult pages that no block list names: dirty words are counted (Raffel et al. 2020; section 3.1.1 of the paper)."""

import dataclasses
import functools
from collections import defaultdict
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.utils._import_utils import ASSETS_PATH

from herd_jax.curation.heuristics.prose import ProseBlock, check_counts, check_fractions
from herd_jax.curation.text import words
from herd_jax.errors import UserError

_DEFAULT_LIST = Path(ASSETS_PATH) / "banned_words.txt"


@dataclasses.dataclass(frozen=True)
class DirtyWordsConfig:
    """A document goes with `min_count` dirty words or more, if they are more than `max_fraction` of its words. `word_list` is a file with a
    word or phrase a line, compared without case and diacritics (None: datatrove's list of words banned from URLs, English)."""

    word_list: str | None = None
    min_count: int = 3
    max_fraction: float = 0.005

    def __post_init__(self):
        check_counts("dirty_words", {"min_count": self.min_count})
        check_fractions("dirty_words", {"max_fraction": self.max_fraction})
        if self.word_list is not None and not Path(self.word_list).is_file():
            raise UserError(f"curation dirty_words.word_list is {self.word_list} and there is no such file: give one with a word a line")


class DirtyWords(ProseBlock):
    """Drops documents with too many words of a list."""

    name = "dirty_words"

    def judge(self, doc: Document, settings: DirtyWordsConfig) -> bool | tuple[bool, str]:
        folded = words.split(doc.text).folded
        count = 0
        for n, phrases in _phrases(settings.word_list):
            grams = words.ngrams(folded, n)
            count += np.count_nonzero(phrases.take(phrases.searchsorted(grams), mode="clip") == grams)
        return (False, "too_many_dirty_words") if count >= settings.min_count and count > settings.max_fraction * len(folded) else True


@functools.cache
def _phrases(word_list: str | None) -> list[tuple[int, np.ndarray]]:
    """Returns the hashes of the phrases of n words, sorted, for each n; "#" begins a comment line."""
    by_length = defaultdict(set)
    for line in Path(word_list or _DEFAULT_LIST).read_text(encoding="utf-8").splitlines():
        folded = words.split(line).folded
        if len(folded) and not line.startswith("#"):
            by_length[len(folded)].add(int(words.ngrams(folded, len(folded))[0]))
    return [(n, np.array(sorted(phrases), np.uint64)) for n, phrases in sorted(by_length.items())]
