import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from herd_jax.errors import UserError
from herd_jax.parallel.schedule import (
    BACKWARD_INPUT,
    BACKWARD_LOWER,
    BACKWARD_UPPER,
    BACKWARD_WEIGHT,
    FORWARD,
    IDLE,
    SCHEDULES,
    PipelineConfig,
    split_layers,
)


def lanes(schedule):
    """One string a rank: F forward, U and L halves of a backward, I and W input and weight gradients; micro-batch; chunk as a letter."""
    letter = "abcdefgh" if schedule.num_chunks > 1 else [""]
    cells = [
        ["-" if op == IDLE else f"{'.FULIW'[op]}{m}{letter[c]}" for op, m, c in zip(*columns)]
        for columns in zip(schedule.operation.T, schedule.micro_batch.T, schedule.chunk.T)
    ]
    return [" ".join(row) for row in cells]


def test_1f1b_by_hand():
    assert lanes(PipelineConfig().build(2, 3)) == ["F0 F1 - - U0 L0 F2 U1 L1 - U2 L2", "- F0 U0 L0 F1 U1 L1 F2 U2 L2 - -"]


def test_gpipe_by_hand():
    assert lanes(PipelineConfig("gpipe").build(2, 2)) == ["F0 F1 - - - U0 L0 U1 L1", "- F0 F1 U0 L0 U1 L1 - -"]


def test_zero_bubble_by_hand():
    """Weight gradients fill what 1F1B leaves idle: 10 ticks where it takes 12, and rank 1 holds two micro-batches instead of one."""
    schedule = PipelineConfig("zero_bubble").build(2, 3)
    assert lanes(schedule) == ["F0 F1 - I0 W0 F2 I1 W1 I2 W2", "- F0 I0 F1 I1 W0 F2 I2 W1 W2"]
    assert schedule.peak_in_flight.tolist() == [2, 2]


def test_interleaved_by_hand():
    assert lanes(PipelineConfig("interleaved", num_chunks=2).build(2, 2)) == [
        "F0a F1a F0b F1b - - U0b L0b - U1b L1b U0a L0a U1a L1a",
        "- F0a F1a F0b U0b L0b F1b U1b L1b U0a L0a U1a L1a - -",
    ]


def test_overlapped_messages_travel_for_a_tick():
    assert lanes(PipelineConfig(overlap=True).build(2, 2)) == ["F0 F1 - - - - U0 L0 - U1 L1", "- - F0 U0 L0 F1 U1 L1 - - -"]


def test_figure_6_of_the_paper():
    """8 stages on 4 ranks, 10 micro-batches, 5 in a row: rank 0 runs stages 0 and 4."""
    schedule = PipelineConfig("interleaved", num_chunks=2, contiguous_micro_batches=5).build(4, 10)
    assert lanes(schedule)[0].split()[:9] == ["F0a", "F1a", "F2a", "F3a", "F4a", "F0b", "F1b", "F2b", "F3b"]
    assert {schedule.stage(tick, 0) for tick in range(len(schedule.operation))} == {0, 4}
    assert schedule.peak_in_flight.tolist() == [9, 8, 7, 6]
    assert schedule.bubble_fraction == pytest.approx(3 / 20)


@st.composite
def cases(draw, names=SCHEDULES):
    """(config, ranks, micro-batches) that can be."""
    name = draw(st.sampled_from(names))
    num_chunks = {"interleaved": draw(st.integers(2, 4)), "zero_bubble": draw(st.integers(1, 4))}.get(name, 1)
    num_ranks, num_micro_batches = draw(st.integers(1 if num_chunks == 1 else 2, 8)), draw(st.integers(1, 20))
    contiguous = draw(st.integers(0, num_micro_batches + 3))
    return PipelineConfig(name, num_chunks, contiguous, draw(st.booleans())), num_ranks, num_micro_batches


def ticks(schedule):
    """Tick of each (operation, stage, micro-batch), each of which is there once and on the rank that holds the stage."""
    when = {}
    for tick, rank in np.argwhere(schedule.operation != IDLE).tolist():
        key = (int(schedule.operation[tick, rank]), schedule.stage(tick, rank), int(schedule.micro_batch[tick, rank]))
        assert key not in when and key[1] % schedule.num_ranks == rank
        when[key] = tick
    return when


def contiguous_runs(schedule, rank, operation):
    """[(chunk, micro-batches)] in the order in which a rank does them."""
    mine = schedule.operation[:, rank] == operation
    items = zip(schedule.chunk[mine, rank].tolist(), schedule.micro_batch[mine, rank].tolist())
    return [(chunk, [m for _, m in run]) for chunk, run in itertools.groupby(items, key=lambda item: item[0])]


@given(cases())
@settings(max_examples=600, deadline=None)
def test_everything_once_and_after_what_it_needs(case):
    config, num_ranks, num_micro_batches = case
    schedule = config.build(num_ranks, num_micro_batches)  # asserts that the ranks do not wait for each other in a circle
    num_stages, latency = num_ranks * config.num_chunks, 2 if config.overlap else 1
    split = config.schedule == "zero_bubble"
    first, second = (BACKWARD_INPUT, BACKWARD_WEIGHT) if split else (BACKWARD_UPPER, BACKWARD_LOWER)
    sends = BACKWARD_INPUT if split else BACKWARD_LOWER
    when = ticks(schedule)
    assert schedule.latency == latency and schedule.operation[-1].any()
    assert when.keys() == set(itertools.product((FORWARD, first, second), range(num_stages), range(num_micro_batches)))
    for stage, m in itertools.product(range(num_stages), range(num_micro_batches)):
        if stage > 0:
            assert when[FORWARD, stage, m] >= when[FORWARD, stage - 1, m] + latency
        if stage < num_stages - 1:
            assert when[first, stage, m] >= when[sends, stage + 1, m] + latency
        else:
            assert when[first, stage, m] > when[FORWARD, stage, m]
        if split:
            assert when[second, stage, m] > when[first, stage, m]
        else:
            assert when[second, stage, m] == when[first, stage, m] + 1


@given(cases(), st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_micro_batches_of_a_chunk_run_in_equal_rows(case, rank):
    """At most N in a row, in as few and as equal rows as there can be, or, of no N, as many as the ranks need to be busy; a row's chunks upward in
    the forward, downward in the backward."""
    config, num_ranks, num_micro_batches = case
    assume(config.num_chunks > 1 and rank < num_ranks)
    schedule = config.build(num_ranks, num_micro_batches)
    contiguous, needed = config.contiguous_micro_batches, num_ranks * (2 if config.overlap else 1)
    backward = BACKWARD_INPUT if config.schedule == "zero_bubble" else BACKWARD_UPPER
    for operation, chunks in ((FORWARD, range(config.num_chunks)), (backward, reversed(range(config.num_chunks)))):
        runs = contiguous_runs(schedule, rank, operation)
        sizes = [len(micro_batches) for _, micro_batches in runs]
        num_rows = -(-num_micro_batches // contiguous) if contiguous else max(1, num_micro_batches // needed)
        assert [chunk for chunk, _ in runs] == list(chunks) * num_rows
        assert max(sizes) <= (contiguous or num_micro_batches) and max(sizes) - min(sizes) <= 1
        rows = [micro_batches for _, micro_batches in runs[:: config.num_chunks]]
        assert sum(rows, []) == list(range(num_micro_batches))
        assert [micro_batches for _, micro_batches in runs] == [row for row in rows for _ in range(config.num_chunks)]


@given(cases())
@settings(max_examples=200, deadline=None)
def test_peaks_in_flight(case):
    config, num_ranks, num_micro_batches = case
    peaks = config.build(num_ranks, num_micro_batches).peak_in_flight.tolist()
    latency = 2 if config.overlap else 1
    if config.schedule == "gpipe":
        assert peaks == [num_micro_batches] * num_ranks
    elif config.schedule == "1f1b":  # min(M, PP - rank) where messages do not overlap
        assert peaks == [min(num_micro_batches, latency * (num_ranks - 1 - rank) + 1) for rank in range(num_ranks)]
    else:
        whole = dataclasses.replace(config, schedule="1f1b" if config.num_chunks == 1 else "interleaved")
        most = whole.build(num_ranks, num_micro_batches).peak_in_flight[0]
        assert max(peaks) <= most <= num_micro_batches * config.num_chunks


@given(st.integers(1, 8), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_bubble_of_one_chunk(num_ranks, num_micro_batches):
    bubble = {name: PipelineConfig(name).build(num_ranks, num_micro_batches).bubble_fraction for name in ("gpipe", "1f1b", "zero_bubble")}
    assert bubble["gpipe"] == bubble["1f1b"] == pytest.approx((num_ranks - 1) / num_micro_batches)
    if num_micro_batches >= num_ranks:
        assert bubble["zero_bubble"] == pytest.approx((num_ranks - 1) / (3 * num_micro_batches))
    assert bubble["zero_bubble"] <= bubble["1f1b"]


@given(st.integers(2, 8), st.integers(2, 4), st.integers(0, 25))
@settings(max_examples=80, deadline=None)
def test_bubble_of_chunks(num_ranks, num_chunks, more):
    """The README's formula, also where ranks and micro-batches do not divide each other."""
    num_micro_batches = num_ranks + more
    for name, thirds in (("interleaved", 3), ("zero_bubble", 1)):
        schedule = PipelineConfig(name, num_chunks).build(num_ranks, num_micro_batches)
        assert schedule.bubble_fraction == pytest.approx((num_ranks - 1) * thirds / (3 * num_chunks * num_micro_batches))


def test_bubble_of_the_paper():
    assert f"{PipelineConfig('interleaved', num_chunks=8).build(16, 16).bubble_fraction:.1%}" == "11.7%"


@given(cases())
@settings(max_examples=150, deadline=None)
def test_evaluation(case):
    config, num_ranks, num_micro_batches = case
    schedule = config.build_evaluation(num_ranks, num_micro_batches)
    num_stages = num_ranks * config.num_chunks
    when = ticks(schedule)
    assert when.keys() == set(itertools.product((FORWARD,), range(num_stages), range(num_micro_batches)))
    for stage, m in itertools.product(range(1, num_stages), range(num_micro_batches)):
        assert when[FORWARD, stage, m] > when[FORWARD, stage - 1, m]
    if config.num_chunks == 1:
        assert len(schedule.operation) == num_micro_batches + num_ranks - 1


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(schedule="2f2b"), ["pipeline.schedule is '2f2b'", "gpipe, 1f1b, interleaved, zero_bubble"]),
        (dict(num_chunks=0), ["pipeline.num_chunks is 0", "1 or more"]),
        (dict(contiguous_micro_batches=-1), ["pipeline.contiguous_micro_batches is -1", "1 or more, or 0"]),
        (dict(schedule="1f1b", num_chunks=2), ["pipeline.num_chunks is 2", "'interleaved' or 'zero_bubble'"]),
        (dict(schedule="gpipe", num_chunks=3), ["pipeline.num_chunks is 3", "or 1 chunk"]),
        (dict(schedule="interleaved"), ["pipeline.num_chunks of 2 or more", "'1f1b'"]),
    ],
)
def test_configs_that_cannot_be(fields, words):
    with pytest.raises(UserError) as error:
        PipelineConfig(**fields)
    assert all(word in str(error.value) for word in words)


def test_sizes_that_cannot_be():
    with pytest.raises(UserError, match="one pipeline rank to hold them: set mesh.pp to 2 or more"):
        PipelineConfig("zero_bubble", num_chunks=2).build(1, 4)
    for num_ranks, num_micro_batches in ((0, 4), (4, 0), (-1, 1)):
        with pytest.raises(UserError, match=f"{num_ranks} ranks and {num_micro_batches} micro-batches .* 1 or more"):
            PipelineConfig().build(num_ranks, num_micro_batches)


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
