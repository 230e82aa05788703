"""Benchmark items in the corpus: how much of each is there, and which documents hold one (sections 3.1.3 and 5.1.4 of the paper).

The contamination of an item is the share of its tokens that lie in an 8-gram seen in the corpus. Tokens are folded words (no case, accents
or punctuation), so that a change of layout hides nothing. An item of fewer than 8 tokens is one n-gram, seen whole or not at
all. Each task notes which n-grams of the index its documents hold; `report` unites the notes: an item spread over documents is found too.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.benchmark_items import Benchmark, read_items
from herd_jax.curation.block import Block, task_file
from herd_jax.curation.text import words
from herd_jax.errors import UserError
from herd_jax.files import whole_file, write_whole

NGRAM = 8
_MAX_TABLE_BITS = 24
THRESHOLDS = (0.2, 0.5, 0.8, 1.0)  # of the report: the paper chooses one for each benchmark after evaluating


@dataclasses.dataclass(frozen=True)
class DecontaminationConfig:
    """Documents go that by themselves hold at least the share `drop_at` of the tokens of an item of 8 or more; without it none do."""

    benchmarks: tuple[Benchmark, ...] = ()  # files of items that must not be trained on
    drop_at: float | None = None  # share of an item's tokens from which a document that holds them goes; none: they are counted alone
    fold_digits: bool = False  # whether an item with other numbers is the same item

    def __post_init__(self):
        if self.drop_at is not None and not 0 < self.drop_at <= 1:
            raise UserError(f"curation drop_at is {self.drop_at}: it must be above 0 and at most 1, or none")
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise UserError(f"curation benchmarks has two of one name among {', '.join(names)}: name each differently")


class Index:
    """The n-grams of all items: `hashes_K` (uint64, sorted) and, item after item, which of them stands at each position (`entries_O`).

    Memory: about 45 bytes for each token of the items (O is their number less 7 an item), and up to 16 MB.
    """

    def __init__(
        self, names: np.ndarray, benchmark_I: np.ndarray, num_tokens_I: np.ndarray, hashes_K: np.ndarray, entries_O: np.ndarray, fold_digits: bool
    ):
        self.names, self.benchmark_I, self.num_tokens_I = names, benchmark_I, num_tokens_I
        self.hashes_K, self.entries_O, self.fold_digits = hashes_K, entries_O, bool(fold_digits)

    @classmethod
    def build(cls, benchmarks: Sequence[Benchmark], fold_digits: bool = False) -> "Index":
        """Indexes the items of the benchmarks. Raises UserError where a benchmark cannot be read or has no items."""
        grams, num_tokens, benchmark_of = [np.empty(0, np.uint64)], [], []
        for number, benchmark in enumerate(benchmarks):
            for text in read_items(benchmark):
                tokens = _tokens(text, fold_digits)
                num_tokens.append(len(tokens))
                benchmark_of.append(number)
                if len(tokens):
                    grams.append(words.ngrams(tokens, min(NGRAM, len(tokens))))
        hashes_K, entries_O = np.unique(np.concatenate(grams), return_inverse=True)
        names = np.array([benchmark.name for benchmark in benchmarks], np.str_)
        return cls(names, np.array(benchmark_of, np.int32), np.array(num_tokens, np.int32), hashes_K, entries_O.astype(np.int32), fold_digits)

    def save(self, path: Path) -> None:
        """Writes the index to a file: the same bytes for the same items."""
        with whole_file(path) as file:
            np.savez(
                file,
                names=self.names,
                benchmark_I=self.benchmark_I,
                num_tokens_I=self.num_tokens_I,
                hashes_K=self.hashes_K,
                entries_O=self.entries_O,
                fold_digits=self.fold_digits,
            )

    @classmethod
    def load(cls, path: Path) -> "Index":
        with np.load(path) as arrays:
            return cls(**arrays)

    def find(self, text: str) -> np.ndarray:
        """Returns the entries, ascending, whose n-grams are among those of a document's tokens."""
        tokens, found = _tokens(text, self.fold_digits), [np.empty(0, np.int64)]
        for n in self._lengths:
            grams = words.ngrams(tokens, n)
            grams = grams[self._begins[grams >> self._shift]]  # rules most out: up to four times as fast
            places = np.minimum(np.searchsorted(self.hashes_K, grams), len(self.hashes_K) - 1)
            found.append(places[self.hashes_K[places] == grams])
        return np.unique(np.concatenate(found))

    def coverage(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items that hold any of these n-grams, ascending, and the share of the tokens of each that lie in one of them."""
        firsts, ends = self._first_posting[entries], self._first_posting[entries + 1]
        counts = ends - firsts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        occurrences = np.sort(self._postings[np.repeat(firsts, counts) + within])
        item_of, starts = self._item_O[occurrences], self._start_O[occurrences]
        # Each covers its n tokens up to where the next begins; the next item's begin no earlier than this one's end.
        length = np.minimum(NGRAM, self.num_tokens_I[item_of])
        covered = np.minimum(length, np.diff(starts, append=np.iinfo(np.int64).max))
        items, position = np.unique(item_of, return_inverse=True)
        return items, np.bincount(position, covered, len(items)) / self.num_tokens_I[items]

    @functools.cached_property
    def _lengths(self) -> list[int]:
        return np.unique(np.minimum(self.num_tokens_I, NGRAM)[self.num_tokens_I > 0]).tolist()

    @functools.cached_property
    def _shift(self) -> np.uint64:
        return np.uint64(64 - min(_MAX_TABLE_BITS, len(self.hashes_K).bit_length() + 3))

    @functools.cached_property
    def _begins(self) -> np.ndarray:
        """Returns whether some n-gram of the index begins with these bits."""
        table = np.zeros(1 << (64 - int(self._shift)), bool)
        table[self.hashes_K >> self._shift] = True
        return table

    @functools.cached_property
    def _num_grams_I(self) -> np.ndarray:
        return np.where(self.num_tokens_I > 0, np.maximum(self.num_tokens_I - NGRAM + 1, 1), 0)

    @functools.cached_property
    def _item_O(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.num_tokens_I), dtype=np.int32), self._num_grams_I)

    @functools.cached_property
    def _start_O(self) -> np.ndarray:
        """Returns the token at which each n-gram begins, counted through all items: int64 [O]."""
        first_token_I = np.cumsum(self.num_tokens_I, dtype=np.int64) - self.num_tokens_I
        first_gram_I = np.cumsum(self._num_grams_I, dtype=np.int64) - self._num_grams_I
        return np.arange(len(self.entries_O)) + (first_token_I - first_gram_I)[self._item_O]

    @functools.cached_property
    def _postings(self) -> np.ndarray:
        """Returns the occurrences of entry 0, then of entry 1, ...: int64 [O]."""
        return np.argsort(self.entries_O, kind="stable")

    @functools.cached_property
    def _first_posting(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(np.bincount(self.entries_O, minlength=len(self.hashes_K)))])


def _tokens(text: str, fold_digits: bool) -> np.ndarray:
    found = words.split(text)
    return found.folded_without_digits if fold_digits else found.folded


class BuildIndex(PipelineStep):
    """Saves the index of the benchmarks' n-grams."""

    type = "index"
    name = "benchmarks"

    def __init__(self, config: DecontaminationConfig, target: Path):
        super().__init__()
        self._config, self._target = config, target

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        Index.build(self._config.benchmarks, self._config.fold_digits).save(self._target)


class Decontaminate(Block):
    """Drops for "contains_BENCHMARK"; writes the entries that a task's kept documents hold into `HITS/TASK.npy`.

    `index` is the file of a saved `Index`. Memory: the index, and about 40 bytes for each word of a document.
    """

    name = "decontamination"

    def __init__(self, config: DecontaminationConfig, index: Path, hits: Path):
        super().__init__()
        self._drop_at, self._index_file, self._hits = config.drop_at, index, hits
        self._seen: np.ndarray | None = None  # bool [K], in a task

    @functools.cached_property
    def _index(self) -> Index:
        return Index.load(self._index_file)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        index = self._index
        entries = index.find(doc.text)
        if len(entries) and self._drop_at is not None:
            items, share = index.coverage(entries)
            whole = items[(share >= self._drop_at) & (index.num_tokens_I[items] >= NGRAM)]
            if len(whole):
                return False, f"contains_{index.names[index.benchmark_I[whole[0]]]}"
        if self._seen is not None:
            self._seen[entries] = True
        return True

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self._seen = np.zeros(len(self._index.hashes_K), bool)
        yield from super().run(data, rank, world_size)
        path = task_file(self._hits, rank, "npy")
        with whole_file(path) as file:
            np.save(file, np.flatnonzero(self._seen).astype(np.int32))
        self._seen = None


@dataclasses.dataclass(frozen=True)
class Contamination:
    """How much of a benchmark the corpus holds: `coverage_I` is the share of each item's tokens that lie in n-grams of the corpus, in the
    order of its items."""

    name: str
    coverage_I: np.ndarray

    def items_at(self, threshold: float) -> int:
        """Returns the number of items of which at least this share is covered."""
        return int((self.coverage_I >= threshold).sum())


def report(index: Index, hit_files: Iterable[Path]) -> list[Contamination]:
    """Returns the contamination of each benchmark by the documents of all tasks."""
    seen = np.zeros(len(index.hashes_K), bool)
    for file in hit_files:
        seen[np.load(file)] = True
    coverage_I = np.zeros(len(index.num_tokens_I))
    items, share = index.coverage(np.flatnonzero(seen))
    coverage_I[items] = share
    return [Contamination(str(name), coverage_I[index.benchmark_I == number]) for number, name in enumerate(index.names)]


def table(report: Sequence[Contamination]) -> str:
    """Returns a line for each benchmark: items, the mean share of their tokens that is covered, and the items at or above each of
    `THRESHOLDS`."""
    width = max([len("benchmark"), *(len(found.name) for found in report)])
    lines = [f"{'benchmark':<{width}}    items    mean" + "".join(f"  >= {threshold:>4.0%}" for threshold in THRESHOLDS)]
    for found in report:
        counts = "".join(f"{found.items_at(threshold):>9,}" for threshold in THRESHOLDS)
        lines.append(f"{found.name:<{width}}{len(found.coverage_I):>9,}{found.coverage_I.mean():>8.1%}{counts}")
    return "\n".join(lines)


class ReportContamination(PipelineStep):
    """Writes, of each benchmark, its items, the mean share of their tokens that the corpus covers, and the items at each threshold."""

    type = "report"
    name = "contamination"

    def __init__(self, index: Path, hits: Path, target: Path):
        super().__init__()
        self._index, self._hits, self._target = index, hits, target

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        found = report(Index.load(self._index), sorted(self._hits.glob("*.npy")))
        rows = [
            {
                "benchmark": one.name,
                "items": len(one.coverage_I),
                "mean_coverage": float(one.coverage_I.mean()),
                "items_at": {f"{threshold:.0%}": one.items_at(threshold) for threshold in THRESHOLDS},
            }
            for one in found
        ]
        write_whole(self._target, json.dumps(rows, indent=1))
