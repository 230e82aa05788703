"""Near duplicates by MinHash and locality-sensitive hashing (Broder 1997; section 3.1.1 of the paper).

There is no clustering: a document goes when an earlier one shares a band with it, which every range of hashes decides for itself. In a chain
of near duplicates A ~ B ~ C with A and C not alike, a cluster would keep A alone; here C goes as well if it comes after B, and stays if B comes
after both.
"""

import dataclasses
import functools

import numpy as np
import xxhash
from datatrove.data import Document

from herd_jax.curation.deduplication import exchange
from herd_jax.curation.deduplication.duplicates import all_but_first, is_first
from herd_jax.curation.text import words

BAND = np.dtype([exchange.KEY, ("document", "<u8")])
SHINGLE_WORDS = 5
BLOCK = 1024  # shingles hashed at once, so that they stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class MinHash:
    """Applies `bands` x `rows` hash functions over the sets of 5 successive words, whatever their case and accents, and with `fold_digits` their
    digits.

    A band's key hashes its minima together with the language: pages are compared within theirs.
    """

    bands: int
    rows: int
    fold_digits: bool = False

    def records(self, doc: Document) -> np.ndarray:
        """Returns BAND [bands], or none for a document without words. One of fewer than 5 words is compared as a whole."""
        found = words.split(doc.text)
        folded = found.folded_without_digits if self.fold_digits else found.folded
        if len(folded) == 0:
            return np.empty(0, BAND)
        minima = self.signature(words.ngrams(folded, min(SHINGLE_WORDS, len(folded)))).reshape(self.bands, self.rows)
        seed = xxhash.xxh3_64_intdigest(doc.metadata["language"].encode())
        records = np.empty(self.bands, BAND)
        records["key"] = [xxhash.xxh3_64_intdigest(row, (seed + band) % 2**64) for band, row in enumerate(minima)]
        records["document"] = doc.metadata["number"]
        return records

    def signature(self, shingles: np.ndarray) -> np.ndarray:
        """Returns uint64 [bands x rows]: the least value of each function over hashed shingles, at least one."""
        multipliers, offsets = self._functions
        minima = [
            (multipliers * block + offsets).min(axis=1) for block in np.split(shingles, range(BLOCK, len(shingles), BLOCK))
        ]
        return np.min(minima, axis=0)

    @functools.cached_property
    def _functions(self) -> np.ndarray:
        """Returns a and b of the functions x -> ax + b modulo 2^64 with odd a, which permutes the hashes: uint64 [2, bands x rows, 1]."""
        functions = np.random.default_rng(0).integers(0, 2**64, (2, self.bands * self.rows, 1), np.uint64)
        functions[0] |= np.uint64(1)
        return functions


def near_duplicates(records: np.ndarray) -> np.ndarray:
    """Returns DUPLICATE for BAND records as an exchange gives them, in order of key and document: the documents that an earlier one shares a
    band with, each once, with the earliest of those."""
    found = all_but_first(records)
    found = found[np.lexsort((found["kept"], found["key"]))]
    return found[is_first(found["key"])]
