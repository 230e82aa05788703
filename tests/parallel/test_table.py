import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.parallel.schedule import SCHEDULES, PipelineConfig
from herd_jax.parallel.table import SLOTS, halves, lower


@st.composite
def cases(draw):
    """(config, ranks, micro-batches, layers of each stage) that can be; a stage may be without a layer."""
    name = draw(st.sampled_from(SCHEDULES))
    num_chunks = {"interleaved": draw(st.integers(2, 3)), "zero_bubble": draw(st.integers(1, 3))}.get(name, 1)
    num_ranks, num_micro_batches = draw(st.integers(1 if num_chunks == 1 else 2, 6)), draw(st.integers(1, 14))
    contiguous = draw(st.integers(0, num_micro_batches + 3))
    num_stages = num_ranks * num_chunks
    layers = draw(st.lists(st.integers(0, 4), min_size=num_stages, max_size=num_stages))
    return PipelineConfig(name, num_chunks, contiguous, draw(st.booleans())), num_ranks, num_micro_batches, tuple(layers)


class Rank:
    """What one rank stores while a table is played. Labels stand for values, and a read of the wrong one fails."""

    def __init__(self, table):
        self.residuals, self.kept = [None] * table.num_residual_slots, [None] * table.num_kept_slots
        self.activations, self.cotangents = [None] * table.num_activation_slots, [None] * table.num_cotangent_slots


def play(table):
    """Plays a table as it is run: in a tick a rank reads, then writes its own result; at the tick's end comes what a neighbour sent at the
    end of this tick, or of the one before where messages overlap. Returns how often each (kind, stage, micro-batch, layer) was done."""
    schedule, layers_of = table.schedule, table.layers_per_stage
    num_ranks, num_stages = schedule.num_ranks, len(layers_of)
    ranks = [Rank(table) for _ in range(num_ranks)]
    done = collections.Counter()
    in_transit = collections.deque([[None] * num_ranks] * (schedule.latency - 1))  # per rank (to the next, to the one before)
    for tick in range(len(table.rows)):
        sent = [None] * num_ranks
        for rank, stored in enumerate(ranks):
            row = {name: int(table.column(name)[tick, rank]) for name in ("micro_batch", "embed", "head", "embed_backward", *SLOTS)}
            spans = {kind: _span(table, kind, tick, rank) for kind in ("weight", "full", "input")}
            stage, m = schedule.stage(tick, rank), row["micro_batch"]
            num_layers, last = layers_of[stage], stage == num_stages - 1
            if table.column("forward")[tick, rank]:
                assert not any(spans.values()) and row["embed"] == (stage == 0)
                assert stage == 0 or stored.activations[_slot(row, "activation")] == ("x", stage, m)
                assert table.column("layer_slot")[tick, rank] == schedule.chunk[tick, rank] * max(1, *layers_of)
                done.update(("forward", stage, m, layer) for layer in range(table.column("forward_count")[tick, rank]))
                done["embed", m] += row["embed"]
                if table.num_residual_slots:
                    stored.residuals[_slot(row, "residual")] = (stage, m)
                    if last:
                        stored.cotangents[_slot(row, "result")] = ("y", stage, m)
                else:
                    done["head", m] += row["head"]
                    assert row["residual"] == row["result"] == -1 and row["head"] == last
                sent[rank] = None if last else ("x", stage + 1, m)
            elif schedule.operation[tick, rank]:
                assert stored.residuals[_slot(row, "residual")] == (stage, m)
                for layer in spans["weight"]:
                    assert (stage, m, layer) in stored.kept[_slot(row, "kept")]
                    done["weight", stage, m, layer] += 1
                if row["cotangent"] >= 0:
                    value = stored.cotangents[row["cotangent"]]
                    if row["head"]:
                        assert last and value == ("y", stage, m)
                        value = ("dx", stage, m, num_layers)  # above the uppermost layer
                        done["head", m] += 1
                    for layer in [*reversed(spans["full"]), *reversed(spans["input"])]:
                        assert value == ("dx", stage, m, layer + 1)
                        value = ("dx", stage, m, layer)
                    done.update(("full", stage, m, layer) for layer in spans["full"])
                    done.update(("input", stage, m, layer) for layer in spans["input"])
                    if spans["input"]:
                        stored.kept[_slot(row, "kept")] = [(stage, m, layer) for layer in spans["input"]]
                    if row["result"] >= 0:
                        stored.cotangents[row["result"]] = value
                    else:
                        assert value == ("dx", stage, m, 0) and row["embed_backward"] == (stage == 0)
                        done["embed_backward", m] += row["embed_backward"]
                        sent[rank] = ("dx", stage - 1, m, layers_of[stage - 1]) if stage > 0 else None
                else:
                    assert not spans["full"] and not spans["input"] and row["result"] == -1
            else:
                assert not any(spans.values()) and not any(row[name] for name in ("embed", "head", "embed_backward"))
        in_transit.append(sent)
        arrived = in_transit.popleft()
        for rank, stored in enumerate(ranks):
            forward, backward = arrived[rank - 1], arrived[(rank + 1) % num_ranks]
            for slots, slot, message, label in (
                (stored.activations, table.column("arriving_activation")[tick, rank], forward, "x"),
                (stored.cotangents, table.column("arriving_cotangent")[tick, rank], backward, "dx"),
            ):
                meant_for_rank = message is not None and message[0] == label
                assert (slot >= 0) == meant_for_rank
                if meant_for_rank:
                    slots[slot] = message
    return done


def _span(table, kind, tick, rank):
    first, count = (int(table.column(f"{kind}_{end}")[tick, rank]) for end in ("first", "count"))
    return range(first, first + count)


def _slot(row, name):
    assert row[name] >= 0
    return row[name]


@given(cases())
@settings(max_examples=300, deadline=None)
def test_every_read_finds_its_value_and_every_layer_is_done_once(case):
    config, num_ranks, num_micro_batches, layers = case
    table = lower(config.build(num_ranks, num_micro_batches), layers)
    done = +play(table)
    expected = collections.Counter()
    for m in range(num_micro_batches):
        expected.update([("embed", m), ("head", m), ("embed_backward", m)])
        for stage, num_layers in enumerate(layers):
            for layer in range(num_layers):
                expected["forward", stage, m, layer] += 1
                whole = done["full", stage, m, layer] == 1
                expected.update([("full", stage, m, layer)] if whole else [("input", stage, m, layer), ("weight", stage, m, layer)])
    assert done == expected
    split = config.schedule == "zero_bubble"
    assert not split or not any(table.column("full_count").ravel())
    assert table.splits_backward == any(kind == "input" for kind, *_ in done)
    assert table.most_kept_layers == (max(layers) if split else int(table.splits_backward))
    assert table.num_kept_slots <= (table.num_residual_slots if split else 1)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_evaluation(case):
    config, num_ranks, num_micro_batches, layers = case
    table = lower(config.build_evaluation(num_ranks, num_micro_batches), layers)
    expected = [("forward", stage, m, layer) for stage, n in enumerate(layers) for layer in range(n) for m in range(num_micro_batches)]
    assert +play(table) == collections.Counter(expected + [(end, m) for end in ("embed", "head") for m in range(num_micro_batches)])
    assert table.num_residual_slots == table.num_kept_slots == table.num_cotangent_slots == 0 and not table.splits_backward
    assert config.num_chunks > 1 or table.num_activation_slots <= 1


@given(st.integers(0, 40), st.booleans())
def test_halves_are_balanced(num_layers, has_head):
    """Below the upper half and the layer that is split lies the lower half; a split layer counts half on either side."""
    upper, middle = halves(num_layers, has_head)
    assert upper.stop == num_layers and len(middle) <= 1 and (not middle or middle.stop == upper.start)
    below = upper.start - len(middle)
    assert below >= 0
    assert len(upper) + has_head == below or num_layers == 0


def test_halves_by_hand():
    assert halves(4, False) == (range(2, 4), range(0))
    assert halves(3, False) == (range(2, 3), range(1, 2))
    assert halves(4, True) == (range(3, 4), range(2, 3))
    assert halves(3, True) == (range(2, 3), range(0))
    assert halves(1, False) == (range(1, 1), range(0, 1))
    assert len(halves(1, True)[0]) == len(halves(1, True)[1]) == 0  # the head alone above, the layer below


def slots(config, num_ranks, num_micro_batches):
    """Slots of (residuals, kept cotangents, activations, cotangents) with three layers in each stage."""
    table = lower(config.build(num_ranks, num_micro_batches), (3,) * num_ranks * config.num_chunks)
    return table.num_residual_slots, table.num_kept_slots, table.num_activation_slots, table.num_cotangent_slots


@given(cases())
@settings(max_examples=150, deadline=None)
def test_residuals_are_stored_for_what_is_in_flight(case):
    config, num_ranks, num_micro_batches, _ = case
    peak = int(config.build(num_ranks, num_micro_batches).peak_in_flight.max())
    num_residual, num_kept, num_activation, num_cotangent = slots(config, num_ranks, num_micro_batches)
    assert num_residual == peak and num_kept <= peak and num_cotangent <= peak
    latency = 2 if config.overlap else 1
    assert num_kept <= latency * (num_ranks - 1) + 1  # as many weight gradients as fill the last rank's wait at the end
    in_a_row = min(num_micro_batches, config.contiguous_micro_batches or 2 * latency * num_ranks)
    assert num_activation <= (latency if config.num_chunks == 1 else max(in_a_row, latency))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("schedule, num_chunks", [("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2), ("zero_bubble", 2)])
def test_memory_does_not_grow_with_micro_batches(schedule, num_chunks, overlap):
    config = PipelineConfig(schedule, num_chunks, overlap=overlap)
    few, some, many = (slots(config, 4, num_micro_batches) for num_micro_batches in (16, 32, 64))
    assert few == some == many
    if schedule == "1f1b":  # residuals, one layer's kept cotangents from half to half, activations on their way, one cotangent
        assert few == ((7, 1, 2, 1) if overlap else (4, 1, 1, 1))


def test_what_is_read_before_it_has_come_is_found():
    schedule = PipelineConfig().build(2, 1)
    operation = schedule.operation.copy()
    operation[:, 1] = np.roll(operation[:, 1], -1)  # rank 1's forward in the tick of rank 0's
    with pytest.raises(AssertionError, match="stage 1 reads micro-batch 0 before it has come"):
        lower(dataclasses.replace(schedule, operation=operation), (1, 1))
