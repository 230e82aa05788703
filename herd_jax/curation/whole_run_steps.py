"""Steps of a curation run that are one task each, and the naming of its streams."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.classification.categories import MULTILINGUAL
from herd_jax.curation.decontamination import THRESHOLDS, DecontaminationConfig, Index, report
from herd_jax.curation.mix import MixConfig, MixSource, plan, training_config
from herd_jax.data.streams import HEADER
from herd_jax.files import write_whole
from herd_jax.text.tokenizer import load_tokenizer

HIGH = "-high"  # the end of a stream's name


class NameStream(PipelineStep):
    """Notes in "stream" which one a document goes to: that of its category, if that is multilingual also of its language, from a quality of
    `high_quality` on one of its own: general, general-high, multilingual-fr, ..."""

    type = "count"
    name = "stream"

    def __init__(self, high_quality: float | None):
        super().__init__()
        self._high_quality = high_quality

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for doc in data:
            quality = doc.metadata.get("quality")
            is_high = self._high_quality is not None and quality is not None and quality >= self._high_quality
            category = doc.metadata["category"]
            language = f"-{doc.metadata['language']}" if category == MULTILINGUAL else ""
            doc.metadata["stream"] = category + language + (HIGH if is_high else "")
            yield doc


class BuildIndex(PipelineStep):
    """Saves the index of the benchmarks' n-grams."""

    type = "index"
    name = "benchmarks"

    def __init__(self, config: DecontaminationConfig, target: Path):
        super().__init__()
        self._config, self._target = config, target

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        Index.build(self._config.benchmarks).save(self._target)


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


class PlanMix(PipelineStep):
    """Writes `mix.json` and `train.py`, a config for `python -m herd_jax.train`, of the streams that can be trained on and validated; no
    `train.py` where there are none."""

    type = "mix"
    name = "mix"

    def __init__(self, config: MixConfig, streams: Path, high_quality: float | None, workdir: Path):
        super().__init__()
        self._config, self._streams, self._high_quality, self._workdir = config, streams, high_quality, workdir

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        sources = []
        for directory in sorted(self._streams.glob("*")):
            quality = self._high_quality if directory.name.endswith(HIGH) else None
            if all(_num_tokens(directory / split) for split in ("train", "validation")):  # a single document leaves one empty
                sources.append(MixSource.open(str(directory), directory.name.split("-")[0], quality))
        if not sources:
            table = "no mix: no category has two documents, one to train and one to validate on"
            write_whole(self._workdir / "mix.json", json.dumps({"phases": [], "epochs": {}, "table": table}, indent=1))
            return
        mix = plan(sources, self._config)
        phases = [
            {"from_tokens": p.from_tokens, "to_tokens": p.to_tokens, "shares": p.shares, "drawn": {source.path: n for source, n in p.drawn.items()}}
            for p in mix.phases
        ]
        epochs = {source.path: value for source, value in mix.epochs().items()}
        write_whole(self._workdir / "mix.json", json.dumps({"phases": phases, "epochs": epochs, "table": str(mix)}, indent=1))
        model = {"name": "llama-5m", "vocab_size": load_tokenizer(self._streams.parent / "tokenizer").vocab_size}
        run = {"workdir": str(self._workdir / "model"), "model": model, "train": {"global_batch_size": 8, "seq_len": 256}}
        training_config(mix, self._workdir / "train.py", run)


def _num_tokens(stream: Path) -> int:
    return sum(json.loads((stream / HEADER).read_text())["shard_tokens"])
