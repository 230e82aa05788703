"""When each tick of a schedule begins and ends, given how long the work in it takes."""

import dataclasses

import numpy as np

from herd_jax.parallel.table import Table


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of one layer, of the ends, and of a message between neighbours; `head` is forward and backward together."""

    forward: float
    backward: float  # whole
    backward_input: float
    backward_weight: float
    embed: float = 0.0
    embed_backward: float = 0.0
    head: float = 0.0
    message: float = 0.0


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Seconds from the start, and how long each rank works: float arrays [num_ticks, num_ranks]."""

    start: np.ndarray
    work: np.ndarray

    @property
    def duration(self) -> float:
        """Returns the seconds until the last rank is done."""
        return float((self.start + self.work).max())

    @property
    def bubble_fraction(self) -> float:
        """Returns the time of waiting over the time of working, of all ranks together."""
        busy = self.work.sum() / self.work.shape[1]
        return float(self.duration / busy - 1)


def simulate(table: Table, costs: Costs, barrier: bool = False) -> Timeline:
    """Simulates a table. Each rank sends both ways at every tick, so it goes on when its neighbours' results of `latency` ticks before have come.

    `barrier`: an exchange waits for all ranks, as between devices of one CPU process, where messages also never overlap with work.
    """
    column, latency = table.column, 1 if barrier else table.schedule.latency
    work = sum(column(f"{kind}_count") * seconds for kind, seconds in (
        ("forward", costs.forward), ("full", costs.backward), ("input", costs.backward_input), ("weight", costs.backward_weight)))  # fmt: skip
    work = work + sum(column(kind) * getattr(costs, kind) for kind in ("embed", "embed_backward", "head"))
    start, end = np.zeros_like(work), np.zeros_like(work)
    for tick in range(len(work)):
        if tick > 0:
            start[tick] = end[tick - 1]
        if tick >= latency and work.shape[1] > 1:
            sent = end[tick - latency]
            arrived = sent.max() if barrier else np.maximum(np.roll(sent, 1), np.roll(sent, -1))
            start[tick] = np.maximum(start[tick], arrived + costs.message)
        end[tick] = start[tick] + work[tick]
    return Timeline(start, work)
