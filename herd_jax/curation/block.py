"""A block of the pipeline: a datatrove filter that gives each document it drops a reason, counts its verdicts and logs what it dropped."""

import json
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from herd_jax.files import whole_file

SAMPLES = 5  # texts that a task keeps of each reason of each block
SAMPLE_CHARACTERS = 2000


class Block(BaseFilter):
    """Subclasses name themselves (one_word_with_underscores, as in the config and the report) and judge documents in `filter`.

    `filter` returns True to keep the document, which it may change, or (False, reason). Counted in the statistics: documents in ("total"),
    kept ("forwarded"), "dropped", "dropped_REASON", and characters kept ("doc_len").
    """

    type = "filter"
    name: str
    log: "DropLog | None" = None  # where the phase that the block runs in has one

    def __init__(self):
        super().__init__()

    @abstractmethod
    def filter(self, doc: Document) -> bool | tuple[bool, str]: ...

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from self.sift(data, self.filter)

    def sift(self, data: Iterable[Document], judge) -> Iterator[Document]:
        """Yields the documents that `judge` keeps; counts and logs the others."""
        # Counted here and not per document: datatrove's statistics cost more than most blocks.
        reasons: Counter[str] = Counter()
        total = characters = 0
        seconds = 0.0
        try:
            for doc in data:
                total += 1
                started = time.perf_counter()
                verdict = judge(doc)
                seconds += time.perf_counter() - started
                if verdict is True:
                    characters += len(doc.text)
                    yield doc
                else:
                    _, reason = verdict
                    reasons[reason] += 1
                    if self.log:
                        self.log.write(doc, self.name, reason)
        finally:
            dropped = sum(reasons.values())
            counts = {"total": total, "forwarded": total - dropped, "dropped": dropped, **{f"dropped_{name}": n for name, n in reasons.items()}}
            for name, count in counts.items():
                self.stat_update(name, value=count, unit="task")
            self.stat_update("doc_len", value=characters, unit="task")
            self.stats.time_stats.update(seconds)


class DropLog(PipelineStep):
    """The last step of a phase: writes `DIRECTORY/TASK.jsonl`, a line for each document that the blocks before it dropped: id, url, block and
    reason, with the beginning of its text for the first `SAMPLES` of a reason."""

    type = "log"
    name = "dropped"

    def __init__(self, directory: Path, steps: Sequence[PipelineStep]):
        super().__init__()
        self._directory = directory
        self._sampled: Counter[tuple[str, str]] = Counter()
        self._file: IO[str] | None = None
        for step in steps:
            if isinstance(step, Block):
                step.log = self

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        # The last generator is the first to start and the last to end, so the file is open while the blocks judge.
        self._sampled.clear()
        path = task_file(self._directory, rank, "jsonl")
        with whole_file(path, "w") as self._file:
            yield from data
        self._file = None

    def write(self, doc: Document, block: str, reason: str) -> None:
        line = {"id": doc.id, "url": doc.metadata.get("url", ""), "block": block, "reason": reason}
        if "duplicate_of" in doc.metadata:
            line["duplicate_of"] = doc.metadata["duplicate_of"]
        self._sampled[block, reason] += 1
        if self._sampled[block, reason] <= SAMPLES:
            line["text"] = doc.text[:SAMPLE_CHARACTERS]
        self._file.write(json.dumps(line) + "\n")


def task_file(directory: Path, task: int, suffix: str) -> Path:
    """Returns the file that a task writes in a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{task:05d}.{suffix}"
