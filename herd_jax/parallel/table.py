"""A schedule made ready to run: for each tick and rank which layers, forward or backward, and the slots in which values wait.

Everything that can be decided before the run is decided here, so the executor (`parallel/pipeline.py`) only does what its row says, and the
simulator (`planning/simulator.py`) reads the same rows. Nothing here knows jax.
"""

import dataclasses

import numpy as np

from herd_jax.parallel.schedule import BACKWARD_INPUT, BACKWARD_LOWER, BACKWARD_UPPER, BACKWARD_WEIGHT, FORWARD, IDLE, Schedule

COLUMNS = (
    "micro_batch",
    "layer_slot",  # of the chunk's first layer among those that the rank stores
    "forward",  # 1 in a forward
    "embed",  # 1 in a forward of the first stage
    "head",  # 1 where the last stage turns its activation into a cotangent (without backwards: into sums)
    "embed_backward",  # 1 where the first stage knows the cotangent of its input
    "forward_count",  # layers, from the chunk's first
    "weight_first", "weight_count",  # layers whose weights' gradient is taken from kept cotangents
    "full_first", "full_count",  # layers that go backward whole
    "input_first", "input_count",  # layers whose input's gradient alone is taken; they keep cotangents
    "residual",  # slot that a forward writes and the backward reads
    "kept",  # slot of the cotangents kept between the two halves of a split backward
    "activation",  # slot from which a forward reads its input
    "arriving_activation",  # slot for what comes from the rank before at the tick's end
    "cotangent",  # slot from which a backward reads
    "result",  # slot among the cotangents to which the rank writes its own result: the last stage's activation, or half a backward
    "arriving_cotangent",  # slot for what comes from the next rank at the tick's end
)  # fmt: skip
SLOTS = ("residual", "kept", "activation", "arriving_activation", "cotangent", "result", "arriving_cotangent")


@dataclasses.dataclass(frozen=True)
class Table:
    """int32 `rows` [num_ticks, num_ranks, len(COLUMNS)]; a slot is -1 where there is none."""

    schedule: Schedule
    layers_per_stage: tuple[int, ...]
    rows: np.ndarray
    num_residual_slots: int
    num_kept_slots: int
    num_activation_slots: int
    num_cotangent_slots: int

    def column(self, name: str) -> np.ndarray:
        return self.rows[:, :, COLUMNS.index(name)]

    @property
    def splits_backward(self) -> bool:
        return bool(self.column("input_count").any())

    @property
    def most_kept_layers(self) -> int:
        """Returns the number of layers for which a kept slot has room."""
        return int(self.column("input_count").max(initial=0))


def halves(num_layers: int, has_head: bool) -> tuple[range, range]:
    """Returns (layers that go backward whole in the upper half, the layer split between the halves or none); those below are the lower half's.

    The head counts as a layer, on top.
    """
    whole, odd = divmod(num_layers + has_head, 2)
    top = num_layers - max(whole - has_head, 0)
    return range(top, num_layers), range(top - 1, top) if odd and num_layers else range(0)


def lower(schedule: Schedule, layers_per_stage: tuple[int, ...]) -> Table:
    """Returns the table of a schedule. A slot is used again as soon as its value is consumed, so buffers hold what is in flight and no more."""
    num_ticks, num_ranks = schedule.operation.shape
    column = {name: np.full((num_ticks, num_ranks), -1 if name in SLOTS else 0, np.int32) for name in COLUMNS}
    evaluates = not (schedule.operation > FORWARD).any()
    when = {}  # (operation, stage, micro-batch) -> tick
    for tick, rank in np.argwhere(schedule.operation != IDLE).tolist():
        operation, stage = int(schedule.operation[tick, rank]), schedule.stage(tick, rank)
        when[operation, stage, int(schedule.micro_batch[tick, rank])] = tick
        _layers(column, (tick, rank), operation, stage, layers_per_stage, evaluates)
    column["micro_batch"][:] = schedule.micro_batch
    column["layer_slot"][:] = schedule.chunk * max(1, *layers_per_stage)
    slots = _slots(schedule, when, column)
    return Table(schedule, tuple(layers_per_stage), np.stack(list(column.values()), axis=-1), *slots)


def _layers(column, at, operation: int, stage: int, layers_per_stage, evaluates: bool) -> None:
    """Fills in which layers run in one tick of one rank, and whether the embedding and the head do."""
    num_layers, last = layers_per_stage[stage], stage == len(layers_per_stage) - 1
    upper, middle = halves(num_layers, last)

    def layers(name: str, span: range) -> None:
        column[f"{name}_first"][at], column[f"{name}_count"][at] = span.start, len(span)

    if operation == FORWARD:
        column["forward"][at] = 1
        column["embed"][at] = stage == 0
        column["forward_count"][at] = num_layers
    elif operation == BACKWARD_UPPER:
        layers("full", upper)
        layers("input", middle)
    elif operation == BACKWARD_LOWER:
        layers("weight", middle)
        layers("full", range(0, upper.start - len(middle)))
    elif operation == BACKWARD_INPUT:
        layers("input", range(num_layers))
    elif operation == BACKWARD_WEIGHT:
        layers("weight", range(num_layers))
    column["head"][at] = last and (operation in (BACKWARD_UPPER, BACKWARD_INPUT) or evaluates)
    column["embed_backward"][at] = stage == 0 and operation in (BACKWARD_LOWER, BACKWARD_INPUT)


def _slots(schedule: Schedule, when: dict, column: dict) -> tuple[int, int, int, int]:
    """Fills in the slots' columns; returns how many slots of residuals, kept cotangents, activations and cotangents a rank needs."""
    travel = schedule.latency - 1  # ticks between sending and arriving
    num_ranks, last_stage = schedule.num_ranks, schedule.num_ranks * schedule.num_chunks - 1
    forwards = [[] for _ in range(num_ranks)]
    for operation, stage, micro_batch in when:
        if operation == FORWARD:
            forwards[stage % num_ranks].append((stage, micro_batch))
    most = [0, 0, 0, 0]
    for rank in range(num_ranks):
        residuals, kept, activations, cotangents = [], [], [], []  # (written at tick, last read at tick, [(column, tick), ...])
        for stage, micro_batch in forwards[rank]:
            at = lambda operation, stage=stage, micro_batch=micro_batch: when.get((operation, stage, micro_batch))
            forward = at(FORWARD)
            if stage > 0:
                arrival = at(FORWARD, stage - 1) + travel
                assert arrival < forward, f"stage {stage} reads micro-batch {micro_batch} before it has come"
                activations.append((arrival, forward, [("arriving_activation", arrival), ("activation", forward)]))
            split = at(BACKWARD_INPUT) is not None
            first, second = (at(BACKWARD_INPUT), at(BACKWARD_WEIGHT)) if split else (at(BACKWARD_UPPER), at(BACKWARD_LOWER))
            if first is None:
                continue
            residuals.append((forward, second, [("residual", tick) for tick in (forward, first, second)]))
            if column["input_count"][first, rank]:
                kept.append((first, second, [("kept", first), ("kept", second)]))
            if stage == last_stage:
                arrival, entries = forward, [("result", forward)]
            else:
                sent = at(BACKWARD_INPUT, stage + 1) if split else at(BACKWARD_LOWER, stage + 1)
                arrival = sent + travel
                entries = [("arriving_cotangent", arrival)]
            assert arrival < first, f"stage {stage} reads the cotangent of micro-batch {micro_batch} before it has come"
            entries += [("cotangent", first)] + ([] if split else [("result", first), ("cotangent", second)])
            cotangents.append((arrival, first if split else second, entries))
        for i, intervals in enumerate((residuals, kept, activations, cotangents)):
            most[i] = max(most[i], _assign(intervals, column, rank))
    return tuple(most)


def _assign(intervals, column: dict, rank: int) -> int:
    """Gives each interval the first free slot (greedy colouring): fills in the slots' columns, returns how many slots it took.

    A slot read in a tick may be written at that tick's end by what arrives. A rank's own results are written during a tick, but since a
    rank does one operation a tick, none is written by another operation than the one that reads.
    """
    free_from: list[int] = []  # per slot: the tick at whose end it is free again
    for written, read, entries in sorted(intervals, key=lambda interval: interval[:2]):
        slot = next((slot for slot, tick in enumerate(free_from) if tick <= written), len(free_from))
        free_from[slot : slot + 1] = [read]
        for name, tick in entries:
            column[name][tick, rank] = slot
    return len(free_from)
