"""Which 8-grams of evaluation items occur in token streams (section 5.1.4 of the paper).

The index is of the items, and the streams are read past it once: it grows with the items (45 bytes a word; all of MMLU 60 MB), whereas an
index of the streams would take 8 bytes a token, 120 TB for the paper's 15T. So other items mean another pass, and other models none.
Words are those of the curation's decontamination (no case, accents or punctuation), so streams of any tokenizer can be searched, and a new
layout or spacing hides nothing. A process reads 0.5M tokens a second or more, and holds the index and some 100 MB.

    DIR/<items>/index.npz, items/       what is looked for
    DIR/<items>/hits/<stream>/*.npy     which of it each part of a stream holds: parts that are there are not read again
    DIR/<items>/phases/                 progress and logs
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.benchmark_items import Benchmark
from herd_jax.curation.decontamination import Decontaminate, DecontaminationConfig, Index, report
from herd_jax.curation.execution import ClusterConfig, CurationPhase, run_phases
from herd_jax.data.streams import HEADER, TokenStream
from herd_jax.errors import UserError
from herd_jax.evaluation.results import item_id
from herd_jax.files import user_path, write_whole
from herd_jax.reliability.lock import only_writer
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer

PART_TOKENS = 2**24  # of a stream that one task reads, unless there were too many tasks
MAX_PARTS = 4096
READ_TOKENS = 2**18  # in memory at a time
OVERLAP = 1024  # tokens read twice where a document is cut: an 8-gram that is longer may be missed there


class StreamTexts(PipelineStep):
    """Task r of n reads the r-th part of the stream's tokens, as texts that end where a document does or after `READ_TOKENS`."""

    type = "reader"
    name = "token_stream"

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @functools.cached_property
    def _stream(self) -> TokenStream:
        return TokenStream(self.path)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._stream.tokenizer_path)

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        num_tokens = self._stream.num_tokens
        first, end = (num_tokens * part // world_size for part in (rank, rank + 1))
        for start in range(first, end, READ_TOKENS):
            stop = min(min(start + READ_TOKENS, end) + OVERLAP, num_tokens)
            ends = self._stream.document_ends(start, stop)
            for tokens in np.split(self._stream.read(start, stop), ends - start):
                yield Document(text=self._tokenizer.decode(tokens), id="")


def scan(
    texts: Mapping[str, Sequence[str]], streams: Sequence[str | Path], directory: str | Path, workers: int = 0
) -> dict[str, np.ndarray]:
    """Returns, for the item texts of each task, which share of each one's words lies in an 8-gram of some stream: float64 [items], in order. A
    text of fewer words is one n-gram, found whole (1) or not at all (0); a text without words is never found.

    `workers` processes read the streams (0: one a core). What they find stays below `directory` for the next call.
    Raises UserError where a stream or its tokenizer cannot be read, and for a task without items.
    """
    sources = [StreamTexts(user_path(path)) for path in streams]
    for source in sources:
        load_tokenizer(TokenStream(source.path).tokenizer_path)  # refused before the first is read, not after
    workdir = user_path(directory) / item_id(*(text for task, items in texts.items() for text in (task, str(len(items)), *items)))
    index_file, phases, hits = workdir / "index.npz", [], []
    with only_writer(workdir):
        if not index_file.is_file():
            Index.build(_benchmarks(texts, workdir / "items")).save(index_file)
        for source in sources:
            key = _key(source.path)
            steps = [source, Decontaminate(DecontaminationConfig(), index_file, workdir / "hits" / key)]
            phases.append(CurationPhase(key, steps, _num_parts(source.path)))
            hits.append(workdir / "hits" / key)
        run_phases(phases, "local", workers, ClusterConfig(), workdir / "phases")
        files = sorted(file for found in hits for file in found.glob("*.npy"))
        found = report(Index.load(index_file), files)
    return {task: contamination.coverage_I for task, contamination in zip(texts, found, strict=True)}


def _benchmarks(texts: Mapping[str, Sequence[str]], directory: Path) -> list[Benchmark]:
    benchmarks = []
    for number, (task, items) in enumerate(texts.items()):
        if not items:
            raise UserError(f"task {task} has no items: give data that has some")
        lines = "".join(json.dumps({"text": text}) + "\n" for text in items)
        path = write_whole(directory / f"task_{number}.jsonl", lines)
        benchmarks.append(Benchmark(f"task_{number}", str(path), ("text",)))
    return benchmarks


def _key(path: Path) -> str:
    """Returns the name under which a stream is searched: another one for a stream that was made anew in the same place."""
    header = path / HEADER
    return item_id(str(path.resolve()), header.read_text(), str(header.stat().st_mtime_ns))


def _num_parts(path: Path) -> int:
    return min(-(-TokenStream(path).num_tokens // PART_TOKENS), MAX_PARTS)
