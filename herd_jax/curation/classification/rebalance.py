"""Topics of which there is too much are downsampled (section 3.1.2 of the paper: its knowledge classifier and the mix)."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.block import Block
from herd_jax.curation.classification.categories import topic_rates
from herd_jax.curation.parquet import rows
from herd_jax.files import write_whole


class TopicRates(PipelineStep):
    """Writes to `target` with which probability the documents of each topic are kept, so that no topic has more of the text than its cap."""

    type = "count"
    name = "topics"

    def __init__(self, caps: Mapping[str, float], documents: Path, target: Path):
        super().__init__()
        self._caps, self._documents, self._target = dict(caps), documents, target

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        characters: Counter[str] = Counter()
        for file in sorted(self._documents.glob("*.parquet")):
            for row in rows(file, ["topic", "text"]):
                characters[row["topic"]] += len(row["text"])
        write_whole(self._target, json.dumps(topic_rates(characters, self._caps), indent=1))


class Rebalance(Block):
    """Keeps a share of each topic's documents, by the hash of their ids: the same ones in every run. `rates` is written by `TopicRates`."""

    name = "rebalance"

    def __init__(self, rates: Path):
        super().__init__()
        self._file = rates
        self._rates: dict[str, float] | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._rates is None:
            self._rates = json.loads(self._file.read_text())
        digest = hashlib.blake2b(doc.id.encode(errors="surrogatepass"), digest_size=8, person=b"rebalance").digest()
        return int.from_bytes(digest, "big") / 2**64 < self._rates[doc.metadata["topic"]] or (False, "topic_over_represented")
