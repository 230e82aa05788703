"""The batch of a step on the mesh, made of rows. A batch depends on (seed, step) alone: there is no cursor to save, and any number of processes
reads the same tokens, each only the rows of its own devices.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from herd_jax.data.mixture import Mixture
from herd_jax.data.ramp import Phase, Ramp
from herd_jax.data.rows import DataConfig, TrainingRows
from herd_jax.data.streams import TokenStream
from herd_jax.parallel.context import zigzag_order

NUM_THREADS, NUM_PREFETCHED = 2, 4
TOKENS = PartitionSpec(None, "dp", "cp")  # of a field with a value for each token: [num_micro_batches, B of all dp ranks, S], in zigzag order
ROWS = PartitionSpec(None, "dp")  # of a field with a value for each row: [num_micro_batches, B of all dp ranks]


class Batches:
    """Random access to this process's part of each step's batch, of `rows` without end for each sequence length; a Grain data source."""

    def __init__(self, rows: Mapping[int, Any], ramp: Ramp, num_steps: int, sharding: NamedSharding):
        self.rows, self.ramp, self.num_steps, self.sharding = rows, ramp, num_steps, sharding

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> "HostBatch":
        phase = self.ramp.phase_at(step)
        return read_batch(self.rows[phase.seq_len], self.ramp.first_row(step), phase, self.sharding)

    def iterate(self, first_step: int) -> Iterator["HostBatch"]:
        """Returns the batches from `first_step` on, read ahead by Grain's threads."""
        options = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=NUM_PREFETCHED)
        return iter(grain.MapDataset.source(self)[first_step:].to_iter_dataset(options))


def stream_batches(config: DataConfig, streams: Sequence[TokenStream], ramp: Ramp, seed: int, num_steps: int, sharding: NamedSharding) -> Batches:
    """Returns the batches of a run on token streams."""
    lengths = {phase.seq_len for phase in ramp.phases}
    rows = {n: TrainingRows(streams, mixture(config, ramp, n), n, seed_of_length(seed, n), config.document_mask) for n in lengths}
    return Batches(rows, ramp, num_steps, sharding)


def mixture(config: DataConfig, ramp: Ramp, seq_len: int) -> Mixture:
    """Returns the mixture of the rows of one length: a phase of `config.phases` begins with the first row of its first step."""
    steps = [0, *(ramp.step_at(phase.from_tokens) for phase in config.phases)]
    weights = [[sources.get(path, 0.0) for path in config.paths] for sources in config.mixtures]
    return Mixture([(ramp.rows_before(step, seq_len), of_phase) for step, of_phase in zip(steps, weights, strict=True)])


def validation_batches(rows: Sequence, phase: Phase, sharding: NamedSharding) -> Iterator["HostBatch"]:
    """Returns all rows in batches of the size of a training batch; the last is filled up with masked rows."""
    return (read_batch(_Padded(rows), first, phase, sharding) for first in range(0, len(rows), phase.global_batch_size))


class HostBatch:
    """This process's rows of one batch, by field and by first row within a micro-batch, tokens in zigzag order."""

    def __init__(self, shape: tuple[int, int, int], blocks: dict[int, dict[str, np.ndarray]]):
        self.shape, self.blocks = shape, blocks  # first row -> field -> [M, rows of the block, S], or without S

    def to_devices(self, sharding: NamedSharding) -> dict[str, jax.Array]:
        """Returns arrays [M, B of all dp ranks, S], or [M, B of all dp ranks] for a field with one value for each row, on the mesh of `sharding`."""

        def make(field, dims):
            def part(index):
                return self.blocks[index[1].start or 0][field][:, :, *index[2:]]

            spec = TOKENS if dims == 3 else ROWS
            return jax.make_array_from_callback(self.shape[:dims], NamedSharding(sharding.mesh, spec), part)

        return {field: make(field, array.ndim) for field, array in next(iter(self.blocks.values())).items()}


def read_batch(rows, first_row: int, phase: Phase, sharding: NamedSharding) -> HostBatch:
    """Reads the batch that begins at `first_row`: its micro-batch m is rows first_row + m * B ... of `rows`, whatever the mesh."""
    num_micro_batches, seq_len = phase.num_micro_batches, phase.seq_len
    batch = phase.global_batch_size // num_micro_batches
    shape = (num_micro_batches, batch, seq_len)
    order = zigzag_order(seq_len, sharding.mesh.shape["cp"])
    spans = {index[1].indices(batch)[:2] for index in sharding.addressable_devices_indices_map(shape).values()}

    def block(start, stop):
        read = [[rows[first_row + m * batch + i] for i in range(start, stop)] for m in range(num_micro_batches)]
        in_order = lambda value: value[order] if np.ndim(value) else value
        return {field: np.stack([np.stack([in_order(row[field]) for row in group]) for group in read]) for field in read[0][0]}

    return HostBatch(shape, {start: block(start, stop) for start, stop in sorted(spans)})


class _Padded:
    """Rows, followed by masked ones."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index < len(self.rows):
            return self.rows[index]
        return {field: np.zeros_like(array) for field, array in self.rows[0].items()}


def seed_of_length(seed: int, seq_len: int) -> int:
    """Returns another seed for each sequence length, so that a later phase does not begin with the rows of an earlier one."""
    return int(np.random.SeedSequence([seed, seq_len]).generate_state(1)[0])
