"""Exact passages that stood earlier are cut out: successive words, at least `passage_words` of them, as written (Lee et al. 2022)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document

from herd_jax.curation.block import Block
from herd_jax.curation.deduplication import exchange
from herd_jax.curation.deduplication.duplicates import is_first
from herd_jax.curation.text import words

PASSAGE = np.dtype([exchange.KEY, ("document", "<u8"), ("position", "<u8")])
REPEATED = np.dtype([exchange.KEY, ("position", "<u8")])  # keyed by document number


class PassageRecords:
    """Gives PASSAGE for a document: every run of `num_words` words, by its hash and the position of its first word. 24 bytes a word."""

    def __init__(self, num_words: int):
        self._num_words = num_words

    def __call__(self, doc: Document) -> np.ndarray:
        keys = words.ngrams(words.split(doc.text).hashes, self._num_words)
        records = np.empty(len(keys), PASSAGE)
        records["key"], records["document"], records["position"] = keys, doc.metadata["number"], np.arange(len(keys))
        return records


def repeated_passages(records: np.ndarray) -> np.ndarray:
    """Returns REPEATED for PASSAGE records as an exchange gives them, in order of key, document and position: all of a key but the first."""
    again = records[~is_first(records["key"])]
    found = np.empty(len(again), REPEATED)
    found["key"], found["position"] = again["document"], again["position"]
    return found


class RepeatedPassages(Block):
    """Cuts repeated passages out of a document and drops one that has no word left."""

    name = "repeated_passages"

    def __init__(self, directory: Path, num_words: int):
        super().__init__()
        self._directory, self._num_words = directory, num_words
        self._found = np.empty(0, REPEATED)

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self._found = exchange.read(self._directory, rank << 32, (rank + 1) << 32)
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        first, last = np.searchsorted(self._found["key"], np.array([doc.metadata["number"], doc.metadata["number"] + 1], np.uint64))
        if first == last:
            return True
        parts = words.split(doc.text)
        positions = self._found["position"][first:last].astype(np.int64)
        edges = np.zeros(len(parts.starts) + 1, np.int64)
        np.add.at(edges, positions, 1)
        np.add.at(edges, positions + self._num_words, -1)
        gone = np.cumsum(edges[:-1]) > 0
        # Text between two kept words stays, whatever stands between a kept and a cut one goes with the cut one.
        kept = np.flatnonzero(~gone)
        if len(kept) == 0:
            return False, "only_repeated_passages"
        runs = np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1)
        doc.text = "\n".join(doc.text[parts.starts[run[0]] : parts.ends[run[-1]]] for run in runs)
        return True
