"""Pipeline schedules as data: which rank does what at which tick, and where each value waits (section 3.3.2 of the paper).

A builder makes a `Schedule`; `plan_buffers` adds to it the slots in which activations wait, so that an executor
(`parallel/pipeline.py`) needs no bookkeeping of its own. Nothing here knows jax.

The model is cut in PP * V stages; stage s is chunk s // PP of rank s % PP. A result sent at the end of one tick can be used at the next.
"""

import dataclasses

import numpy as np

IDLE, FORWARD, BACKWARD = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Operation, micro-batch and chunk of each rank at each tick: int arrays [num_ticks, num_ranks]."""

    num_chunks: int
    num_micro_batches: int
    operation: np.ndarray
    micro_batch: np.ndarray
    chunk: np.ndarray

    @property
    def num_ranks(self) -> int:
        return self.operation.shape[1]

    @property
    def bubble_fraction(self) -> float:
        """Idle ticks over busy ticks of a rank, forward and backward counted as equally long."""
        busy = np.count_nonzero(self.operation) / self.num_ranks
        return (len(self.operation) - busy) / busy


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """The layers of each stage. The embedding and the output head count as a layer each, so the first and the last stage hold fewer.

    126 layers on 128 stages leave the first and the last without one (the paper's balance); of layers that do not divide,
    the extra ones go where the fewest are.
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


def one_forward_one_backward(num_ranks: int, num_micro_batches: int) -> Schedule:
    """1F1B: a rank holds at most (num_ranks - rank) micro-batches in flight, and prefers a backward that is ready."""
    done = {FORWARD: np.full((num_ranks, num_micro_batches), -1), BACKWARD: np.full((num_ranks, num_micro_batches), -1)}
    count = {FORWARD: [0] * num_ranks, BACKWARD: [0] * num_ranks}
    rows, tick = [], 0
    while min(count[BACKWARD]) < num_micro_batches:
        row = []
        for rank in range(num_ranks):
            forward, backward = count[FORWARD][rank], count[BACKWARD][rank]
            before = done[BACKWARD][rank + 1] if rank + 1 < num_ranks else done[FORWARD][rank]
            if backward < forward and 0 <= before[backward] < tick:
                row.append((BACKWARD, backward))
            elif forward < min(num_micro_batches, backward + num_ranks - rank) and (
                rank == 0 or 0 <= done[FORWARD][rank - 1][forward] < tick
            ):
                row.append((FORWARD, forward))
            else:
                row.append((IDLE, 0))
        for rank, (operation, micro_batch) in enumerate(row):
            if operation != IDLE:
                done[operation][rank, micro_batch] = tick
                count[operation][rank] += 1
        rows.append(row)
        tick += 1
    operation, micro_batch = np.moveaxis(np.array(rows, np.int32), 2, 0)
    return Schedule(1, num_micro_batches, operation, micro_batch, np.zeros_like(operation))


def forward_only(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Each rank runs the micro-batches in order, one tick behind the rank before it: for evaluation."""
    tick, rank = np.indices((num_micro_batches + num_ranks - 1, num_ranks), dtype=np.int32)
    micro_batch = tick - rank
    valid = (micro_batch >= 0) & (micro_batch < num_micro_batches)
    operation = np.where(valid, FORWARD, IDLE).astype(np.int32)
    return Schedule(1, num_micro_batches, operation, np.where(valid, micro_batch, 0), np.zeros_like(operation))


@dataclasses.dataclass(frozen=True)
class Table:
    """What each rank does and where it reads and writes: int arrays [num_ticks, num_ranks], -1 where there is nothing.

    `residual`: slot of the residuals that a forward writes and the matching backward reads.
    `activation`: slot from which a forward reads its input; `arriving_activation`: slot for what comes from the rank before at the tick's end.
    `cotangent`: slot from which a backward reads, and to which the forward of the last stage writes the activation that its head
    will turn into a cotangent; `arriving_cotangent`: slot for what comes from the next rank at the tick's end.
    """

    operation: np.ndarray
    micro_batch: np.ndarray
    chunk: np.ndarray
    residual: np.ndarray
    activation: np.ndarray
    arriving_activation: np.ndarray
    cotangent: np.ndarray
    arriving_cotangent: np.ndarray
    num_residual_slots: int
    num_activation_slots: int
    num_cotangent_slots: int

    COLUMNS = ("operation", "micro_batch", "chunk", "residual", "activation", "arriving_activation", "cotangent", "arriving_cotangent")

    def rows(self) -> np.ndarray:
        """The columns stacked: int32 [num_ticks, num_ranks, len(COLUMNS)]."""
        return np.stack([getattr(self, column) for column in self.COLUMNS], axis=-1).astype(np.int32)


def plan_buffers(schedule: Schedule) -> Table:
    """Gives each waiting value a slot, reused as soon as the value is consumed, so buffers hold what is in flight and no more."""
    num_ticks, num_ranks = schedule.operation.shape
    last_stage = num_ranks * schedule.num_chunks - 1
    when = {}  # (operation, stage, micro-batch) -> tick
    for tick, rank in np.argwhere(schedule.operation != IDLE):
        stage = int(schedule.chunk[tick, rank]) * num_ranks + int(rank)
        when[int(schedule.operation[tick, rank]), stage, int(schedule.micro_batch[tick, rank])] = int(tick)
    columns = {name: np.full((num_ticks, num_ranks), -1, np.int32) for name in Table.COLUMNS[3:]}
    residuals, activations, cotangents = [], [], []  # per rank: (written at tick, last read at tick, [(column, tick), ...])
    for rank in range(num_ranks):
        mine = [(stage, micro_batch) for (op, stage, micro_batch) in when if op == FORWARD and stage % num_ranks == rank]
        keep, inputs, outputs = [], [], []
        for stage, micro_batch in mine:
            forward, backward = when[FORWARD, stage, micro_batch], when.get((BACKWARD, stage, micro_batch))
            if stage > 0:
                sent = when[FORWARD, stage - 1, micro_batch]
                assert sent < forward, f"stage {stage} reads micro-batch {micro_batch} before stage {stage - 1} has sent it"
                inputs.append((sent, forward, [("arriving_activation", sent), ("activation", forward)]))
            if backward is None:
                continue
            keep.append((forward, backward, [("residual", forward), ("residual", backward)]))
            if stage == last_stage:
                assert forward < backward
                outputs.append((forward, backward, [("cotangent", forward), ("cotangent", backward)]))
            else:
                sent = when[BACKWARD, stage + 1, micro_batch]
                assert sent < backward, f"stage {stage} reads the cotangent of micro-batch {micro_batch} before it is sent"
                outputs.append((sent, backward, [("arriving_cotangent", sent), ("cotangent", backward)]))
        for intervals, sizes in ((keep, residuals), (inputs, activations), (outputs, cotangents)):
            sizes.append(_assign_slots(intervals, columns, rank))
    return Table(schedule.operation, schedule.micro_batch, schedule.chunk, **columns,
                 num_residual_slots=max(residuals), num_activation_slots=max(activations), num_cotangent_slots=max(cotangents))  # fmt: skip


def _assign_slots(intervals, columns, rank: int) -> int:
    """Greedy colouring of intervals: fills in the slots' columns, returns how many slots it took.

    A slot read in a tick may be written at that tick's end by what arrives, but a forward writes during the tick: since a rank does one
    operation a tick, no value is written by an operation of the tick in which another is read.
    """
    free_from = []  # per slot: the tick at whose end it is free again
    for written, read, entries in sorted(intervals, key=lambda interval: interval[:2]):
        slot = next((slot for slot, tick in enumerate(free_from) if tick <= written), len(free_from))
        free_from[slot : slot + 1] = [read]
        for column, tick in entries:
            columns[column][tick, rank] = slot
    return len(free_from)
