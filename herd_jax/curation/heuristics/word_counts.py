"""The words of a corpus by language, counted on the way to `outliers.Outliers`: a count a task, then their sum."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.block import task_file
from herd_jax.curation.heuristics import outliers
from herd_jax.curation.heuristics.prose import CODE
from herd_jax.curation.text import words
from herd_jax.files import whole_file

MAX_TASKS = 256  # whose words are counted, evenly spaced: a distribution of words needs no more


class CountWords(PipelineStep):
    """Lets documents pass and writes how often each bin of words comes in the prose of each language to `DIRECTORY/TASK.npz`."""

    type = "count"
    name = "words"

    def __init__(self, directory: Path):
        super().__init__()
        self._directory = directory

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        if rank % -(-world_size // MAX_TASKS):
            yield from data
            return
        counts: dict[str, np.ndarray] = {}
        for doc in data:
            if doc.metadata["media_type"] != CODE:
                of_language = counts.setdefault(doc.metadata["language"], np.zeros(outliers.BINS, np.int64))
                outliers.add_words(of_language, words.split(doc.text))
            yield doc
        _write(task_file(self._directory, rank, "npz"), counts)


class SumWords(PipelineStep):
    """Writes the sum of the counts of a directory to `target`."""

    type = "count"
    name = "sum_words"

    def __init__(self, directory: Path, target: Path):
        super().__init__()
        self._directory, self._target = directory, target

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        total: dict[str, np.ndarray] = {}
        for file in sorted(self._directory.glob("*.npz")):
            with np.load(file) as counts:
                for language in counts.files:
                    total[language] = total.get(language, 0) + counts[language]
        _write(self._target, total)


def _write(path: Path, counts: dict[str, np.ndarray]) -> None:
    with whole_file(path) as file:
        np.savez_compressed(file, **counts)
