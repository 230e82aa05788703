"""Checkpoints of a training run: the parameters of one, a few layers at a time, without the optimizer's state."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import tensorstore

from herd_jax.config import to_dict
from herd_jax.errors import UserError
from herd_jax.interop.formats.mapping import parameters
from herd_jax.interop.source import Source, tokenizer_in
from herd_jax.reliability.workdir import CHECKPOINTS, TOKENIZER, stage_directories
from herd_jax.training.checkpoints.checkpoint import Checkpointer
from herd_jax.training.checkpoints.orbax_storage import Unreadable
from herd_jax.training.config import RunConfig
from herd_jax.training.resume import parse_saved
from herd_jax.training.state import State, StatePlan

RECORD = "record"  # what every checkpoint's directory has in it
_CHECKSUM_BLOCK = 1 << 18  # elements at a time, so that intermediate values stay in the processor's cache


def open_workdir(workdir: Path) -> Source:
    """Opens the newest checkpoint of a run. Raises UserError where there is none, or none is readable."""
    newest = Checkpointer(workdir / CHECKPOINTS, keep=1).newest()
    if newest is None:
        raise UserError(f"{workdir} has no readable checkpoint: train longer, or wait for the first one")
    return _source(workdir, workdir, *newest)


def open_checkpoint(path: Path) -> Source:
    """Opens the checkpoint `WORKDIR/checkpoints/STEP`. Raises UserError where it is not readable."""
    path = path.absolute()
    try:
        record = Checkpointer(path.parent, keep=1).read_record(int(path.name))
    except (ValueError, Unreadable) as error:
        raise UserError(f"{path} is no readable checkpoint of a training run ({error}): name another one") from error
    source = _source(path, path.parents[1], path / "state", record)
    return dataclasses.replace(source, run=f"{source.run}@{path.name}")  # this step was asked for, and no other


def newest_checkpoints(workdir: Path, number: int) -> list[Path]:
    """Returns the directories of the `number` newest checkpoints of a run, oldest first. Raises UserError where it has fewer."""
    steps = Checkpointer(workdir / CHECKPOINTS, keep=1).steps()
    if len(steps) < number:
        raise UserError(
            f"{workdir} has checkpoints of {len(steps)} steps ({', '.join(map(str, steps)) or 'none'}), not of {number}: ask for fewer, "
            "or train with a larger checkpoint.keep"
        )
    return [workdir / CHECKPOINTS / str(step) for step in steps[-number:]]


def _source(path: Path, workdir: Path, directory: Path, record: dict) -> "CheckpointSource":
    run = parse_saved(record["config"])
    context_length = max(record["position"].get("context_length") or 0, *(phase.seq_len for phase in run.train.ramp.phases))
    tokenizer_path = tokenizer_in(workdir / TOKENIZER)
    return CheckpointSource(
        path, run.model.resolve(), np.dtype(np.float32), context_length, tokenizer_path, directory, record["checksums"], _run_of(run, record)
    )


def _run_of(run: RunConfig, record: dict) -> str:
    """Returns what is the same for all checkpoints of a run: its seed, its dimensions, and the content of what it began with."""
    known = record["position"].get("identities", {})
    sources = [[known.get("data", {}).get(path, path), weight] for path, weight in run.data.sources.items()]
    settled = {"seed": run.seed, "init_from": list(known.get("init_from", {}).values()), "model": to_dict(run.model.resolve()), "sources": sources}
    return hashlib.blake2b(json.dumps(settled).encode(), digest_size=16).hexdigest()


def read_state(checkpoint: Path, plan: StatePlan) -> State:
    """Returns the whole canonical state of the checkpoint WORKDIR/checkpoints/STEP, sharded as `plan` says. Raises UserError where it is damaged,
    or does not fit."""
    try:
        return Checkpointer(checkpoint.parent, keep=1).read(int(checkpoint.name), plan.abstract_canonical()).state
    except Unreadable as error:
        raise UserError(f"the checkpoint {checkpoint} is damaged ({error}): name another one") from error

def open_stages(workdir: Path) -> Source:
    """Opens the newest stage of the run in `workdir` that has a checkpoint. Raises UserError where none has one, or none is readable."""
    stages = stage_directories(workdir)
    begun = (stage for stage in reversed(stages) if any((stage / CHECKPOINTS).glob("[0-9]*")))
    return open_workdir(next(begun, (stages or [workdir])[0]))


@dataclasses.dataclass(frozen=True)
class CheckpointSource(Source):
    """A checkpoint: `directory` is that of the state; `checksums` are those of its leaves. A parameter that is read whole is verified."""

    directory: Path
    checksums: dict[str, int]
    run: str  # the same for all checkpoints of a run, also when it trains on; with its step where that was asked for
    _sums: dict[str, dict] = dataclasses.field(default_factory=dict)  # name -> layer -> its share of the checksum

    @property
    def fingerprint(self) -> str:
        return self.run

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
            if len(sums) == max(1, len(declaration.layers)) and sum(sums.values()) % 2**32 != self.checksums[leaf]:
                raise UserError(self._damaged(name))
        return values

    def _open(self, name: str) -> tensorstore.TensorStore:
        """Opens an array as Orbax writes it."""
        base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self.directory}/"}, "path": f"params.{name}/"}
        return tensorstore.open({"driver": "zarr", "kvstore": base}, open=True, read=True).result()

    def _damaged(self, name: str) -> str:
        return f"the checkpoint {self.directory.parent} is damaged ({name}): move it away to use the one before it"


def _checksum(values: np.ndarray, layer: int) -> int:
    """Returns a layer's share of the checkpoint's checksum of the parameter."""
    bits, total = np.ascontiguousarray(values).reshape(-1).view(np.uint32), 0
    for start in range(0, bits.size, _CHECKSUM_BLOCK):
        block = bits[start : start + _CHECKSUM_BLOCK]
        first = layer * bits.size + start
        index = np.arange(first, first + block.size, dtype=np.uint64).astype(np.uint32)
        total += int((block * (2 * index + 1)).sum(dtype=np.uint32))
    return total % 2**32
