import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.parallel.schedule import SCHEDULES, PipelineConfig
from herd_jax.parallel.table import lower
from herd_jax.planning.simulator import Costs, simulate

TICK = Costs(forward=1.0, backward=2.0, backward_input=1.0, backward_weight=1.0)  # of one layer


def simulated(config, num_ranks, num_micro_batches, layers=None, barrier=False, **costs):
    table = lower(config.build(num_ranks, num_micro_batches), layers or (1,) * num_ranks * config.num_chunks)
    return table, simulate(table, dataclasses.replace(TICK, **costs), barrier)


@st.composite
def cases(draw):
    """(config, ranks, micro-batches) that can be."""
    name = draw(st.sampled_from(SCHEDULES))
    num_chunks = {"interleaved": draw(st.integers(2, 3)), "zero_bubble": draw(st.integers(1, 3))}.get(name, 1)
    num_ranks, num_micro_batches = draw(st.integers(1 if num_chunks == 1 else 2, 6)), draw(st.integers(1, 14))
    return PipelineConfig(name, num_chunks, draw(st.integers(0, 14)), draw(st.booleans())), num_ranks, num_micro_batches


@given(st.integers(1, 6), st.integers(1, 14), st.integers(1, 3), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_equal_ticks_last_as_long_as_there_are_ticks(num_ranks, num_micro_batches, num_chunks, message):
    """One layer a stage and no head: forward, input gradient and weight gradient take a second each."""
    case = PipelineConfig("zero_bubble", num_chunks if num_ranks > 1 else 1), num_ranks, num_micro_batches
    table, timeline = simulated(*case)
    num_ticks = len(table.rows)
    assert timeline.duration == num_ticks
    assert timeline.work.sum() == np.count_nonzero(table.schedule.operation)
    assert timeline.bubble_fraction == pytest.approx(table.schedule.bubble_fraction)
    between = message * (num_ticks - 1) if num_ranks > 1 else 0
    assert simulated(*case, message=message, barrier=True)[1].duration == pytest.approx(num_ticks + between)
    assert num_ticks <= simulated(*case, message=message)[1].duration <= num_ticks + between + 1e-9


@pytest.mark.parametrize(
    "schedule, num_chunks, bubble", [("gpipe", 1, 3 / 8), ("1f1b", 1, 3 / 8), ("interleaved", 2, 3 / 16), ("zero_bubble", 2, 1 / 16)]
)
def test_bubbles_come_near_those_of_the_schedule(schedule, num_chunks, bubble):
    """Layers so many that the head, which costs nothing here but counts as one where a backward is halved, hardly matters."""
    _, timeline = simulated(PipelineConfig(schedule, num_chunks), 4, 8, layers=(1000,) * 4 * num_chunks)
    assert timeline.bubble_fraction == pytest.approx(bubble, rel=0.01)


@given(cases(), st.floats(0, 3), st.floats(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_barrier_is_never_faster_than_neighbours(case, message, head):
    _, neighbours = simulated(*case, message=message, head=head)
    _, barrier = simulated(*case, message=message, head=head, barrier=True)
    assert barrier.duration >= neighbours.duration - 1e-9
    assert (barrier.work == neighbours.work).all()


@given(cases(), st.floats(0, 3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_order_of_ticks_and_messages(case, message, barrier):
    """No rank begins before its own tick before, nor before what its neighbours sent `latency` ticks ago has come."""
    config, num_ranks, _ = case
    _, timeline = simulated(*case, message=message, barrier=barrier)
    end = timeline.start + timeline.work
    latency = 2 if config.overlap and not barrier else 1
    for tick in range(1, len(end)):
        assert (timeline.start[tick] >= end[tick - 1]).all()
        for rank in range(num_ranks if tick >= latency and num_ranks > 1 else 0):
            senders = range(num_ranks) if barrier else {(rank - 1) % num_ranks, (rank + 1) % num_ranks}
            assert all(timeline.start[tick, rank] >= end[tick - latency, sender] + message for sender in senders)
    assert timeline.start.min() == 0 and timeline.duration == end.max()


def test_overlap_hides_messages():
    """A message as long as a tick doubles the time where it does not overlap, and costs a longer way through the ranks where it does."""
    overlapping = PipelineConfig("zero_bubble", overlap=True)
    table, waiting = simulated(PipelineConfig("zero_bubble"), 4, 16, message=1.0)
    assert len(table.rows) == 3 * 16 + 3 and waiting.duration >= 1.9 * len(table.rows)
    table, hidden = simulated(overlapping, 4, 16, message=1.0)
    assert hidden.duration == len(table.rows) == 3 * 16 + 2 * 3
    assert simulated(overlapping, 4, 16, message=1.0, barrier=True)[1].duration == 2 * len(table.rows) - 1


def test_one_micro_batch_on_two_ranks_by_hand():
    """Forward on rank 0, forward on rank 1, its head (3 s) and input gradient, that of rank 0, weights; half a second from rank to rank."""
    table, timeline = simulated(PipelineConfig("zero_bubble"), 2, 1, head=3.0, message=0.5)
    assert timeline.work.tolist() == [[1, 0], [0, 1], [0, 3 + 1], [1, 1], [1, 0]]
    assert timeline.start.tolist() == [[0, 0], [1, 1.5], [3, 2.5], [7, 6.5], [8, 8.5]]
    assert timeline.duration == 9 and timeline.bubble_fraction == pytest.approx(9 / 4.5 - 1)
    _, barrier = simulated(PipelineConfig("zero_bubble"), 2, 1, head=3.0, message=0.5, barrier=True)
    assert barrier.start.tolist() == [[0, 0], [1.5, 1.5], [3, 3], [7.5, 7.5], [9, 9]] and barrier.duration == 10


def test_one_rank_never_waits():
    """Two layers and a head of 2 s: per micro-batch forward 2 x 1 s and whole backward 2 x 2 s; the embedding once each way."""
    _, timeline = simulated(PipelineConfig(), 1, 3, layers=(2,), head=2.0, embed=0.25, embed_backward=0.5, message=9.0)
    assert timeline.duration == 3 * (0.25 + 2 + 2 + 4 + 0.5) and timeline.bubble_fraction == 0


def test_a_slow_head_delays_all():
    """The last rank is busy throughout, so the step lasts as long as its work and the way there and back."""
    _, timeline = simulated(PipelineConfig(), 2, 20, layers=(2, 2), head=4.0)
    assert timeline.work[:, 1].sum() == 20 * (2 + 4 + 4)
    assert 200 <= timeline.duration <= 200 + 2 + 2 + 4
