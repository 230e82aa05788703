"""Deduplication without a step of a single process: emitters write records by hash, reducers see all records of a range of hashes and write the
documents to drop, a block drops them. Here of whole documents: the same URL, and the config of all levels (section 3.1.1 of the paper)."""

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.block import Block
from herd_jax.curation.deduplication import exchange
from herd_jax.curation.web_address import normalise
from herd_jax.errors import UserError

URL = np.dtype([exchange.KEY, ("date", "<i8"), ("document", "<u8")])
DUPLICATE = np.dtype([exchange.KEY, ("kept", "<u8")])  # keyed by the number of the document to drop


@dataclasses.dataclass(frozen=True)
class DeduplicationConfig:
    """`bands` x `rows` MinHash finds a pair of Jaccard similarity s with probability 1 - (1 - s^rows)^bands; 0 bands: none. The paper gives
    no shape, 14 x 8 is FineWeb's. A line goes where more than `max_line_documents` of `line_bucket` successive documents hold it.
    `passage_words`: a passage of at least so many words that stood earlier is cut out; none: it stays."""

    urls: bool = True  # whether only the newest version of a URL stays
    bands: int = 14  # of MinHash; 0: no near-duplicates are looked for
    rows: int = 8  # hashes of a band
    fold_digits: bool = False  # whether texts that differ in no more than digits are near-duplicates, as datatrove has it
    lines: bool = True  # whether lines go that many documents hold
    max_line_documents: int = 6  # documents of a bucket that may hold a line
    line_bucket: int = 30_000_000  # successive documents of a bucket
    passage_words: int | None = None  # words from which on a passage that stood earlier is cut out; none: it stays

    def __post_init__(self):
        for name in ("rows", "max_line_documents", "line_bucket"):
            if getattr(self, name) < 1:
                raise UserError(f"deduplication.{name} is {getattr(self, name)}: it must be 1 or more")
        if self.bands < 0:
            raise UserError(f"deduplication.bands is {self.bands}: it must be 0 (near duplicates are not looked for) or more")
        if self.passage_words is not None and self.passage_words < 8:
            raise UserError(f"deduplication.passage_words is {self.passage_words}: it must be 8 or more, or none")


class Emit(PipelineStep):
    """Lets documents pass and writes the records that `of_document` gives for each to the exchange in `directory`."""

    type = "emit"

    def __init__(self, directory: Path, dtype: np.dtype, of_document: Callable[[Document], np.ndarray]):
        self.name = directory.name
        super().__init__()
        self._directory, self._dtype, self._of_document = directory, dtype, of_document

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        records = [np.empty(0, self._dtype)]
        for doc in data:
            records.append(self._of_document(doc))
            yield doc
        exchange.write(self._directory, rank, np.concatenate(records))


class Reduce(PipelineStep):
    """Gives `function` the records of the task's range of hashes, sorted by it, and writes the records that it returns to `target`."""

    type = "reduce"

    def __init__(self, source: Path, target: Path, function: Callable[[np.ndarray], np.ndarray]):
        self.name = target.name
        super().__init__()
        self._source, self._target, self._function = source, target, function

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        records = exchange.read(self._source, *exchange.key_range(rank, world_size))
        exchange.write(self._target, rank, self._function(records))


class Duplicates(Block):
    """Drops the documents that a reducer wrote to `directory`; notes in "duplicate_of" which one stays, as TASK:PLACE."""

    def __init__(self, directory: Path, reason: str):
        self.name = directory.name
        super().__init__()
        self._directory, self._reason = directory, reason
        self._kept: dict[int, int] = {}

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        found = exchange.read(self._directory, rank << 32, (rank + 1) << 32)[::-1]  # of several, the first is looked up
        self._kept = dict(zip(found["key"].tolist(), found["kept"].tolist()))
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if (kept := self._kept.get(doc.metadata["number"])) is None:
            return True
        doc.metadata["duplicate_of"] = f"{kept >> 32:05d}:{kept & 0xFFFFFFFF}"
        return False, self._reason


def url_records(doc: Document) -> np.ndarray:
    """Returns URL [1], or none for a document without a URL."""
    url = normalise(doc.metadata["url"])
    if not url:
        return np.empty(0, URL)
    return np.array([(xxhash.xxh3_64_intdigest(url.encode(errors="replace")), seconds(doc.metadata["date"]), doc.metadata["number"])], URL)


def older_versions(records: np.ndarray) -> np.ndarray:
    """Returns DUPLICATE for URL records: all of a URL but its newest, of several equally new but the first."""
    return all_but_first(records[np.lexsort((records["document"], -records["date"], records["key"]))])


def all_but_first(records: np.ndarray) -> np.ndarray:
    """Returns DUPLICATE for records in order: those that share the key of the one before, each with the first of its key."""
    first = is_first(records["key"])
    kept = records["document"][first][np.cumsum(first) - 1]
    found = np.empty((~first).sum(), DUPLICATE)
    found["key"], found["kept"] = records["document"][~first], kept[~first]
    return found


def is_first(sorted_keys: np.ndarray) -> np.ndarray:
    """Returns bool: whether each key differs from the one before."""
    return np.concatenate([np.ones(min(len(sorted_keys), 1), bool), sorted_keys[1:] != sorted_keys[:-1]])


def seconds(date: str) -> int:
    """Returns the seconds from 1970 to an ISO 8601 date; to the distant past if it is none."""
    try:
        moment = datetime.datetime.fromisoformat(date)
    except ValueError:
        return -(2**62)
    return round((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp())
