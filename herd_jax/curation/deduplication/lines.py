"""Lines that more than 6 documents of a bucket of 30M share go (section 3.1.1 of the paper, after ccNet): menus, banners, legal notes.

A line is compared in lower case, its digits as 0, without punctuation; within its language; once a document. Source code keeps its lines.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.block import Block, task_file
from herd_jax.curation.deduplication import exchange
from herd_jax.curation.deduplication.duplicates import is_first
from herd_jax.curation.parquet import num_documents
from herd_jax.files import whole_file

LINE = np.dtype([exchange.KEY, ("bucket", "<u8")])
TASKS_AT_ONCE = 1024  # whose dropped documents are held in memory
_DIGIT, _NOT_WORD = re.compile(r"\d"), re.compile(r"\W+")


class CountSurvivors(PipelineStep):
    """Writes int64 [tasks + 1]: how many documents of the tasks before each one survive `dropped`, exchanges of documents to drop."""

    type = "count"
    name = "survivors"

    def __init__(self, documents: Path, dropped: tuple[Path, ...], num_tasks: int, target: Path):
        super().__init__()
        self._documents, self._dropped, self._num_tasks, self._target = documents, dropped, num_tasks, target

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        counts = np.array([num_documents(task_file(self._documents, task, "parquet")) for task in range(self._num_tasks)], np.int64)
        for first in range(0, self._num_tasks, TASKS_AT_ONCE):
            low, high = first << 32, (first + TASKS_AT_ONCE) << 32
            gone = np.unique(np.concatenate([np.empty(0, np.uint64), *(exchange.read(directory, low, high)["key"] for directory in self._dropped)]))
            counts -= np.bincount((gone >> np.uint64(32)).astype(np.int64), minlength=self._num_tasks)
        with whole_file(self._target) as file:
            np.save(file, np.cumsum([0, *counts]))


class Bucket(PipelineStep):
    """Notes in "bucket" in which bucket of `size` successive surviving documents a document lies."""

    type = "count"
    name = "bucket"

    def __init__(self, survivors: Path, size: int):
        super().__init__()
        self._survivors, self._size = survivors, size

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for ordinal, doc in enumerate(data, start=int(np.load(self._survivors)[rank])):
            doc.metadata["bucket"] = ordinal // self._size
            yield doc


def line_records(doc: Document) -> np.ndarray:
    """Returns LINE [lines that differ]."""
    keys = np.unique(line_keys(doc))
    records = np.empty(len(keys), LINE)
    records["key"], records["bucket"] = keys, doc.metadata["bucket"]
    return records[keys != 0]


def line_keys(doc: Document) -> np.ndarray:
    """Returns uint64 [lines]: the hash of each line with its language, 0 for lines without a letter or digit and for source code."""
    lines = doc.text.split("\n")
    if doc.metadata["media_type"] == "text/x-code":
        return np.zeros(len(lines), np.uint64)
    seed = xxhash.xxh3_64_intdigest(doc.metadata["language"].encode())
    normalised = [_NOT_WORD.sub(" ", line).strip() for line in _DIGIT.sub("0", doc.text.lower()).split("\n")]
    keys = [xxhash.xxh3_64_intdigest(line.encode(errors="replace"), seed) if line else 0 for line in normalised]
    return np.array(keys, np.uint64)


class FrequentLines(PipelineStep):
    """Writes, a bucket at a time, the lines that more than `max_documents` of its documents hold to the exchange TARGET/BUCKET."""

    type = "reduce"
    name = "frequent_lines"

    def __init__(self, source: Path, target: Path, max_documents: int):
        super().__init__()
        self._source, self._target, self._max_documents = source, target, max_documents

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        records = exchange.read(self._source, *exchange.key_range(rank, world_size))
        for bucket in np.unique(records["bucket"]):
            keys = records[records["bucket"] == bucket]
            starts = np.flatnonzero(is_first(keys["key"]))
            counts = np.diff(np.append(starts, len(keys)))
            exchange.write(self._target / f"{bucket:05d}", rank, keys[starts[counts > self._max_documents]])


class DuplicateLines(Block):
    """Takes the frequent lines of its bucket out of a document and drops one that consists of them. Holds 8 bytes for each such line."""

    name = "duplicate_lines"

    def __init__(self, frequent: Path):
        super().__init__()
        self._directory = frequent
        self._frequent: dict[int, np.ndarray] = {}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        bucket = doc.metadata["bucket"]
        if bucket not in self._frequent:
            parts = exchange.parts_between(self._directory / f"{bucket:05d}", 0, 2**64)
            self._frequent = {bucket: np.sort(np.concatenate([np.empty(0, np.uint64), *(part["key"] for part in parts)]))}
        frequent, keys = self._frequent[bucket], line_keys(doc)
        if len(frequent) == 0:
            return True
        gone = (frequent[np.minimum(np.searchsorted(frequent, keys), len(frequent) - 1)] == keys) & (keys != 0)
        if not gone.any():
            return True
        lines = np.array(doc.text.split("\n"), object)
        doc.text = "\n".join(lines[~gone])
        return True if (keys[~gone] != 0).any() else (False, "only_frequent_lines")
