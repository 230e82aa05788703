"""Pipeline schedules as data: which rank does what at which tick (section 3.3.2 of the paper). Nothing here knows jax.

The model is cut in PP * V stages; stage s is chunk s // PP of rank s % PP. A tick is the time of one forward. A backward takes two: either
whole, the upper and then the lower half of the stage's layers, or split, the gradient of the inputs at once and that of the weights when
there is time. Ranks wait for each other at every tick; where a forward and both parts of a backward take equally long, no time is lost by it.
"""

import dataclasses

import numpy as np

from herd_jax.errors import UserError

IDLE, FORWARD, BACKWARD_UPPER, BACKWARD_LOWER, BACKWARD_INPUT, BACKWARD_WEIGHT = range(6)
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Operation, micro-batch and chunk of each rank at each tick: int arrays [num_ticks, num_ranks].

    A result sent at a tick's end can be used `latency` ticks later: 1, or 2 where messages travel during the tick that follows.
    """

    num_chunks: int
    num_micro_batches: int
    latency: int
    operation: np.ndarray
    micro_batch: np.ndarray
    chunk: np.ndarray

    @property
    def num_ranks(self) -> int:
        return self.operation.shape[1]

    @property
    def bubble_fraction(self) -> float:
        """Returns idle ticks over busy ticks of a rank: (PP - 1) / (V * M) for 1F1B and its interleaved form."""
        busy = np.count_nonzero(self.operation) / self.num_ranks
        return (len(self.operation) - busy) / busy

    @property
    def peak_in_flight(self) -> np.ndarray:
        """Returns how many micro-batches' activations of one chunk each rank holds at most: int [num_ranks]."""
        begun = np.cumsum(self.operation == FORWARD, axis=0)
        ended = np.cumsum(np.isin(self.operation, (BACKWARD_LOWER, BACKWARD_WEIGHT)), axis=0)
        return np.max(begun - np.vstack([np.zeros_like(ended[:1]), ended[:-1]]), axis=0)

    def stage(self, tick: int, rank: int) -> int:
        return int(self.chunk[tick, rank]) * self.num_ranks + rank


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How micro-batches go through the stages of the pipeline. As many of one chunk in a row as there are ranks is depth-first, all of them
    is breadth-first."""

    schedule: str = "1f1b"  # gpipe | 1f1b | interleaved | zero_bubble
    num_chunks: int = 1  # stages on each rank; 2 or more with interleaved
    contiguous_micro_batches: int = 0  # of one chunk in a row; 0: at least as many as ranks, or twice as many with overlap
    overlap: bool = False  # messages have one tick to travel, and hide behind it

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"pipeline.schedule is '{self.schedule}': it must be one of {', '.join(SCHEDULES)}")
        if self.num_chunks < 1:
            raise UserError(f"pipeline.num_chunks is {self.num_chunks}: it must be 1 or more")
        if self.contiguous_micro_batches < 0:
            raise UserError(f"pipeline.contiguous_micro_batches is {self.contiguous_micro_batches}: it must be 1 or more, or 0 to have it chosen")
        if self.num_chunks > 1 and self.schedule in ("gpipe", "1f1b"):
            raise UserError(
                f"pipeline.schedule '{self.schedule}' runs one chunk on each rank and pipeline.num_chunks is {self.num_chunks}: "
                "choose 'interleaved' or 'zero_bubble', or 1 chunk"
            )
        if self.num_chunks == 1 and self.schedule == "interleaved":
            raise UserError("pipeline.schedule 'interleaved' needs pipeline.num_chunks of 2 or more: set it, or choose '1f1b'")

    def check_ranks(self, num_ranks: int) -> None:
        """Raises UserError where the schedule cannot run on so many ranks."""
        if num_ranks == 1 and self.num_chunks > 1:
            raise UserError(f"pipeline.num_chunks is {self.num_chunks} and there is one pipeline rank to hold them: set mesh.pp to 2 or more")

    def build(self, num_ranks: int, num_micro_batches: int) -> Schedule:
        """Returns the schedule of a training step. Raises UserError where there is none."""
        self.check_ranks(num_ranks)
        if num_ranks < 1 or num_micro_batches < 1:
            raise UserError(f"a pipeline of {num_ranks} ranks and {num_micro_batches} micro-batches cannot be: both must be 1 or more")
        latency = 2 if self.overlap else 1
        groups = self._groups(num_micro_batches, latency * num_ranks)
        forwards, backwards = _forward_order(groups, self.num_chunks), _backward_order(groups, self.num_chunks)
        ahead = [_forwards_ahead(groups, rank, num_ranks, self.num_chunks, latency) for rank in range(num_ranks)]
        if self.schedule == "gpipe":
            ahead = [num_micro_batches] * num_ranks
        split = self.schedule == "zero_bubble"
        orders = [_alternate(forwards, backwards, n, BACKWARD_INPUT if split else BACKWARD_UPPER) for n in ahead]
        return _place(orders, num_ranks, self.num_chunks, num_micro_batches, latency)

    def build_evaluation(self, num_ranks: int, num_micro_batches: int) -> Schedule:
        """Returns the schedule of an evaluation: forwards only, chunk by chunk as in the training step."""
        groups = self._groups(num_micro_batches, num_ranks)
        order = [(FORWARD, *item) for item in _forward_order(groups, self.num_chunks)]
        return _place([order] * num_ranks, num_ranks, self.num_chunks, num_micro_batches, latency=1)

    def _groups(self, num_micro_batches: int, least: int) -> list[range]:
        """Returns the micro-batches that a chunk runs in a row, in groups as equal as they can be.

        They are as few groups of at most `contiguous_micro_batches` as there can be. Where that is left open, they are as many groups of at
        least `least` as there can be: in a smaller one, ranks would wait for the micro-batches that are under way.
        """
        if self.contiguous_micro_batches:
            count = -(-num_micro_batches // self.contiguous_micro_batches)
        else:
            count = max(1, num_micro_batches // least)
        edges = [num_micro_batches * i // count for i in range(count + 1)]
        return [range(start, stop) for start, stop in zip(edges[:-1], edges[1:])]


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Returns the layers of each stage. The embedding and the output head count as a layer each, so the first and the last stage hold fewer.

    126 layers on 128 stages leave the first and the last without one (the paper's balance). Where layers do not divide
    evenly, the extra ones go to the stages that have the fewest.
    """
    load, count = [0] * num_stages, [0] * num_stages
    load[0] += 1
    load[-1] += 1
    for _ in range(num_layers):
        stage = min(range(num_stages), key=lambda s: (load[s], count[s], s))
        load[stage] += 1
        count[stage] += 1
    starts = np.concatenate([[0], np.cumsum(count)])
    return [range(start, stop) for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist())]


def _forward_order(groups: list[range], num_chunks: int) -> list[tuple[int, int]]:
    """Returns the forwards in order as (micro-batch, chunk), the same on every rank."""
    return [(m, chunk) for group in groups for chunk in range(num_chunks) for m in group]


def _backward_order(groups: list[range], num_chunks: int) -> list[tuple[int, int]]:
    return [(m, chunk) for group in groups for chunk in reversed(range(num_chunks)) for m in group]


def _forwards_ahead(groups: list[range], rank: int, num_ranks: int, num_chunks: int, latency: int) -> int:
    """Returns how many forwards a rank does before it alternates: those of the chunks before the last one, and one for each rank that the first
    micro-batch has still to visit. With several chunks, these are at most twice the smallest group: with more, ranks would wait in a circle."""
    sizes = [len(group) for group in groups]
    to_visit = latency * (num_ranks - 1 - rank)
    return (num_chunks - 1) * max(sizes) + (min(to_visit, 2 * min(sizes)) if num_chunks > 1 else to_visit)


def _alternate(forwards, backwards, ahead: int, backward: int) -> list[tuple[int, int, int]]:
    """Returns a rank's operations in order, as (operation, micro-batch, chunk): `ahead` forwards, then a forward and a backward in turn, then
    the backwards that are left."""
    order = [(FORWARD, *item) for item in forwards[:ahead]]
    for i, item in enumerate(backwards):
        order += [(FORWARD, *item) for item in forwards[ahead + i : ahead + i + 1]]
        order.append((backward, *item))
    return order


def _place(orders, num_ranks: int, num_chunks: int, num_micro_batches: int, latency: int) -> Schedule:
    """Gives each operation the first tick at which what it needs is there, and keeps each rank's order.

    Where backwards are split, a rank that would wait computes a gradient of weights that it has put off, and so does one that has put off
    more of them than it needs to fill its wait at the end.
    """
    last_stage, never = num_ranks * num_chunks - 1, 1 << 40
    sent = {FORWARD: {}, BACKWARD_LOWER: {}}  # (stage, micro-batch) -> tick at which the result is known
    position = [0] * num_ranks
    begun: list = [None] * num_ranks  # the backward whose upper half was done in the tick before
    left: list[list] = [[] for _ in range(num_ranks)]  # gradients of weights still to be done

    def is_ready(operation, micro_batch, chunk, rank, tick) -> bool:
        stage = chunk * num_ranks + rank
        if operation == FORWARD:
            return stage == 0 or sent[FORWARD].get((stage - 1, micro_batch), never) + latency <= tick
        if stage == last_stage:
            return sent[FORWARD].get((stage, micro_batch), never) < tick
        return sent[BACKWARD_LOWER].get((stage + 1, micro_batch), never) + latency <= tick

    def choose(rank, tick):
        if begun[rank]:
            return (BACKWARD_LOWER, *begun[rank])
        waits = position[rank] == len(orders[rank]) or len(left[rank]) > latency * rank
        if not waits and is_ready(*orders[rank][position[rank]], rank, tick):
            return orders[rank][position[rank]]
        return (BACKWARD_WEIGHT, *left[rank][0]) if left[rank] else (IDLE, 0, 0)

    rows = []
    while any(position[rank] < len(orders[rank]) or begun[rank] or left[rank] for rank in range(num_ranks)):
        tick = len(rows)
        rows.append([choose(rank, tick) for rank in range(num_ranks)])
        stuck = tick >= latency and not any(operation for row in rows[-latency - 1 :] for operation, *_ in row)
        assert not stuck, f"the ranks wait for each other at tick {tick}"
        for rank, (operation, micro_batch, chunk) in enumerate(rows[-1]):
            key = (chunk * num_ranks + rank, micro_batch)
            position[rank] += operation in (FORWARD, BACKWARD_UPPER, BACKWARD_INPUT)
            begun[rank] = (micro_batch, chunk) if operation == BACKWARD_UPPER else None
            if operation == FORWARD:
                sent[FORWARD][key] = tick
            elif operation in (BACKWARD_LOWER, BACKWARD_INPUT):
                sent[BACKWARD_LOWER][key] = tick
            if operation == BACKWARD_INPUT:
                left[rank].append((micro_batch, chunk))
            elif operation == BACKWARD_WEIGHT:
                left[rank].pop(0)
    operation, micro_batch, chunk = np.moveaxis(np.array(rows, np.int32), 2, 0)
    return Schedule(num_chunks, num_micro_batches, latency, operation, micro_batch, chunk)
