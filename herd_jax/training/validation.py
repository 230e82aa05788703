"""Validation of a run: the loss on held-out rows of its sources, the same rows at every evaluation."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from herd_jax.data.batches import validation_batches
from herd_jax.data.ramp import Phase
from herd_jax.data.rows import validation_rows
from herd_jax.data.streams import TokenStream
from herd_jax.errors import UserError
from herd_jax.text.tokenizer import Tokenizer
from herd_jax.training.config import RunConfig
from herd_jax.training.step import Steps


class HeldOutLoss(NamedTuple):
    """Sums over the targets of held-out rows: losses in nats, targets, UTF-8 bytes of their text (of special tokens: none)."""

    nats: float
    num_targets: float
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_targets

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    @classmethod
    def total(cls, parts: Sequence["HeldOutLoss"]) -> Self:
        return cls(*map(sum, zip(*parts)))


class Validation:
    """The held-out `streams` of a run, in the order of its `data.paths`, in batches of the shape of training."""

    def __init__(self, config: RunConfig, steps: Steps, streams: Sequence[TokenStream], tokenizer: Tokenizer):
        self._config, self._steps, self._streams, self._tokenizer = config, steps, streams, tokenizer
        self._num_bytes: dict[tuple[Phase, str], int] = {}
        self.names = source_names(config.data.paths)

    def by_source(self, params: Any, phase: Phase, heed: Callable[[], None] = lambda: None) -> dict[str, HeldOutLoss]:
        """Returns the loss of each source that has rows among the `eval.num_batches` batches of `phase`, by name. Calls `heed` after each batch."""
        return {name: self._loss(params, phase, name, rows, heed) for name, rows in self._rows(phase).items()}

    def check(self, phases: Iterable[Phase]) -> None:
        """Raises UserError, before a run begins, where an evaluation in one of its phases would have nothing to measure."""
        for phase in phases:
            for name, rows in self._rows(phase).items():
                if not self._bytes(phase, name, rows):
                    raise UserError(
                        f"the {len(rows)} held-out rows of {name} that an evaluation takes have no text to predict: raise eval.num_batches, or "
                        "make the source from more text"
                    )

    def metrics(self, params: Any, phase: Phase, heed: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Returns `val_loss` (nats per token) and `val_bits_per_byte` over all rows; where there are several sources, also
        `val_bits_per_byte/SOURCE` of each."""
        found = self.by_source(params, phase, heed)
        total = HeldOutLoss.total(list(found.values()))
        values = {"val_loss": total.nats_per_token, "val_bits_per_byte": total.bits_per_byte}
        if len(self.names) > 1:
            values |= {f"val_bits_per_byte/{name}": loss.bits_per_byte for name, loss in found.items()}
        return values

    def _loss(self, params: Any, phase: Phase, name: str, rows: Sequence, heed: Callable[[], None]) -> HeldOutLoss:
        sharding = self._steps.batch_sharding
        found = []
        for batch in validation_batches(rows, phase, sharding):
            sums, counts = self._steps.evaluate(params, batch.to_devices(sharding))
            found.append((float(sums["loss"]), float(counts["targets"])))
            heed()
        nats, num_targets = map(float, np.sum(found, 0))
        return HeldOutLoss(nats, num_targets, self._bytes(phase, name, rows))

    def _rows(self, phase: Phase) -> dict[str, Sequence]:
        """Returns the rows of an evaluation, of each source that has some among them."""
        num_rows = self._config.eval.num_batches * phase.global_batch_size
        sources = validation_rows(self._streams, phase.seq_len, num_rows, self._config.data.document_mask)
        return {name: rows for name, rows in zip(self.names, sources, strict=True) if len(rows)}

    def _bytes(self, phase: Phase, name: str, rows: Sequence) -> int:
        if (phase, name) not in self._num_bytes:
            self._num_bytes[phase, name] = sum(int(self._bytes_of_id[row["targets"][row["loss_mask"]]].sum()) for row in rows)
        return self._num_bytes[phase, name]

    @functools.cached_property
    def _bytes_of_id(self) -> np.ndarray:
        return np.array([self._tokenizer.num_bytes(token_id) for token_id in range(self._tokenizer.vocab_size)])


def source_names(paths: Sequence[str]) -> list[str]:
    """Returns the names of the sources: the last part of each path, or the whole paths where two would have the same name."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
