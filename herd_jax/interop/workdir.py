"""The newest checkpoint of a training run: its parameters, a few layers at a time, without the optimizer's state."""

import dataclasses
from pathlib import Path

import numpy as np
import tensorstore

from herd_jax.config import parse
from herd_jax.errors import UserError
from herd_jax.interop.mapping import parameters
from herd_jax.interop.source import Source, tokenizer_in
from herd_jax.training.checkpoint import Checkpointer
from herd_jax.training.run import RunConfig

CHECKPOINTS = "checkpoints"
_CHECKSUM_BLOCK = 1 << 18  # elements: what is computed of them stays in the processor's cache


def open_workdir(workdir: Path) -> Source:
    """Raises UserError where no checkpoint is, or none is readable."""
    newest = Checkpointer(workdir / CHECKPOINTS, keep=1).newest()
    if newest is None:
        raise UserError(f"{workdir} has no readable checkpoint: train longer, or wait for the first one")
    directory, record = newest
    run = parse(RunConfig, record["config"])
    context_length = max(phase.seq_len for phase in run.train.ramp.phases)
    tokenizer_path = tokenizer_in(workdir / "tokenizer")
    return CheckpointSource(
        workdir, run.model.resolve(), np.dtype(np.float32), context_length, tokenizer_path, directory, record["checksums"]
    )


@dataclasses.dataclass(frozen=True)
class CheckpointSource(Source):
    """`directory` is that of the state; `checksums` are those of its leaves. A parameter that is read whole is verified."""

    directory: Path
    checksums: dict[str, int]
    _sums: dict[str, dict] = dataclasses.field(default_factory=dict)  # name -> layer -> its share of the checksum

    def read(self, name, layer=None, index=None):
        declaration = parameters(self.config)[name]
        where = index or (slice(None),) * len(declaration.shape)
        try:
            values = self._open(name)[where if layer is None else (layer, *where)].read().result()
        except (ValueError, OSError) as error:  # tensorstore's, of damaged files
            raise UserError(self._damaged(name)) from error
        if index is None:
            sums = self._sums.setdefault(name, {})
            sums[layer] = _checksum(values, layer or 0)
            leaf = ".params" + "".join(f"['{key}']" for key in name.split("."))
            if len(sums) == max(1, declaration.num_layers) and sum(sums.values()) % 2**32 != self.checksums[leaf]:
                raise UserError(self._damaged(name))
        return values

    def _open(self, name: str) -> tensorstore.TensorStore:
        """As Orbax writes an array."""
        base = {"driver": "ocdbt", "base": f"file://{self.directory}/", "path": f"params.{name}/"}
        return tensorstore.open({"driver": "zarr", "kvstore": base}, open=True, read=True).result()

    def _damaged(self, name: str) -> str:
        return f"the checkpoint {self.directory.parent} is damaged ({name}): move it away to use the one before it"


def _checksum(values: np.ndarray, layer: int) -> int:
    """A layer's share of the checkpoint's checksum of the parameter."""
    bits, total = np.ascontiguousarray(values).reshape(-1).view(np.uint32), 0
    for start in range(0, bits.size, _CHECKSUM_BLOCK):
        block = bits[start : start + _CHECKSUM_BLOCK]
        first = layer * bits.size + start
        index = np.arange(first, first + block.size, dtype=np.uint64).astype(np.uint32)
        total += int((block * (2 * index + 1)).sum(dtype=np.uint32))
    return total % 2**32
