import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.parallel.schedule import BACKWARD, FORWARD, IDLE, forward_only, one_forward_one_backward, plan_buffers, split_layers


def test_one_forward_one_backward_by_hand():
    schedule = one_forward_one_backward(2, 3)
    lanes = [
        " ".join("-" if op == IDLE else f"{'.FB'[op]}{m}" for op, m in zip(schedule.operation[:, rank], schedule.micro_batch[:, rank]))
        for rank in range(2)
    ]
    assert lanes == ["F0 F1 - B0 F2 B1 - B2", "- F0 B0 F1 B1 F2 B2 -"]


@given(st.integers(1, 9), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_every_micro_batch_once_in_order_and_within_bounds(num_ranks, num_micro_batches):
    schedule = one_forward_one_backward(num_ranks, num_micro_batches)
    for rank in range(num_ranks):
        lane = list(zip(schedule.operation[:, rank].tolist(), schedule.micro_batch[:, rank].tolist()))
        assert [m for op, m in lane if op == FORWARD] == list(range(num_micro_batches))
        assert [m for op, m in lane if op == BACKWARD] == list(range(num_micro_batches))
        in_flight = np.cumsum([{FORWARD: 1, BACKWARD: -1, IDLE: 0}[op] for op, _ in lane])
        assert in_flight.max() == min(num_ranks - rank, num_micro_batches)
    assert schedule.bubble_fraction == pytest.approx((num_ranks - 1) / num_micro_batches)
    table = plan_buffers(schedule)  # asserts that nothing is read before it is sent
    assert table.num_residual_slots == min(num_ranks, num_micro_batches)
    run_table(table, num_ranks)


@given(st.integers(1, 9), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_forward_only(num_ranks, num_micro_batches):
    table = plan_buffers(forward_only(num_ranks, num_micro_batches))
    assert len(table.operation) == num_micro_batches + num_ranks - 1 and table.num_residual_slots == 0 and table.num_activation_slots <= 1
    run_table(table, num_ranks)


def run_table(table, num_ranks):
    """Plays the table with labels for values: every read finds the value it should."""
    slots = {kind: [{} for _ in range(num_ranks)] for kind in ("residual", "activation", "cotangent")}
    for tick in range(len(table.operation)):
        sent = []
        for rank in range(num_ranks):
            op, m = table.operation[tick, rank], table.micro_batch[tick, rank]
            if op == FORWARD:
                if rank > 0:
                    assert slots["activation"][rank][table.activation[tick, rank]] == ("x", m)
                slots["residual"][rank][table.residual[tick, rank]] = m
                if rank == num_ranks - 1:
                    slots["cotangent"][rank][table.cotangent[tick, rank]] = ("y", m)
                else:
                    sent.append((rank + 1, "activation", table.arriving_activation[tick, rank + 1], ("x", m)))
            if op == BACKWARD:
                assert slots["residual"][rank][table.residual[tick, rank]] == m
                assert slots["cotangent"][rank][table.cotangent[tick, rank]] == ("y" if rank == num_ranks - 1 else "dy", m)
                if rank > 0:
                    sent.append((rank - 1, "cotangent", table.arriving_cotangent[tick, rank - 1], ("dy", m)))
        for rank, kind, slot, value in sent:
            assert slot >= 0 or table.num_residual_slots == 0 and kind == "cotangent"
            slots[kind][rank][slot] = value


def test_layers_of_stages():
    assert [len(r) for r in split_layers(126, 128)] == [0] + [1] * 126 + [0]  # the paper's 16 x 8 slots
    assert [len(r) for r in split_layers(32, 4)] == [8, 8, 8, 8]
    assert [len(r) for r in split_layers(80, 1)] == [80]
    assert split_layers(6, 2) == [range(0, 3), range(3, 6)]


@given(st.integers(1, 200), st.integers(1, 64))
def test_layers_are_all_there_and_balanced(num_layers, num_stages):
    stages = split_layers(num_layers, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    load = [len(stage) for stage in stages]
    load[0] += 1
    load[-1] += 1
    busy = [n for n in load if n] if num_layers + 2 < num_stages else load
    assert max(busy) - min(busy) <= 1 or num_layers < num_stages
