"""The batch ramp: by hand, the paper's, and properties of any ramp against counting step by step."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_jax.data.ramp import Phase, Ramp
from herd_jax.errors import UserError
from herd_jax.training.recipes import NUM_STEPS, batch_ramp


def test_one_phase():
    ramp = Ramp((Phase(0, 4, 32, 2),))
    assert ramp.first_steps() == [0]
    assert [ramp.tokens_before(step) for step in (0, 1, 5)] == [0, 128, 640]
    assert [ramp.first_row(step) for step in (0, 1, 5)] == [0, 4, 20]


def test_by_hand():
    """Steps of 20 tokens until at least 50 are done (3 steps, 60), then of 40 until 130 (2 steps, 140), then of 80."""
    first, second, third = phases = Phase(0, 2, 10, 1), Phase(50, 4, 10, 2), Phase(130, 4, 20, 4)
    ramp = Ramp(phases)
    assert ramp.first_steps() == [0, 3, 5]
    assert [ramp.phase_at(step) for step in range(7)] == [first] * 3 + [second] * 2 + [third] * 2
    assert [ramp.tokens_before(step) for step in range(8)] == [0, 20, 40, 60, 100, 140, 220, 300]
    assert [ramp.first_row(step) for step in range(7)] == [0, 2, 4, 6, 10, 0, 4]  # rows of length 10, then of length 20


def test_a_phase_begins_on_the_dot():
    assert Ramp((Phase(0, 2, 10, 1), Phase(40, 4, 10, 1))).first_steps() == [0, 2]
    assert Ramp((Phase(0, 2, 10, 1), Phase(41, 4, 10, 1))).first_steps() == [0, 3]


def test_a_phase_that_one_step_jumps_over_is_left_out():
    ramp = Ramp((Phase(0, 10, 10, 1), Phase(20, 1, 10, 1), Phase(90, 2, 10, 1)))
    assert ramp.first_steps() == [0, 1, 1]
    assert ramp.phase_at(1).global_batch_size == 2
    assert ramp.tokens_before(3) == 140


def test_the_papers_ramp():
    """Section 3.4.1: 4M tokens in sequences of 4,096; 8M of 8,192 from 252M tokens on; 16M from 2.87T on; 15.6T in all."""
    phases = batch_ramp(dp=64)
    ramp = Ramp(tuple(Phase(**dataclasses.asdict(phase)) for phase in phases))
    mega = 2**20
    assert [phase.tokens_per_step for phase in ramp.phases] == [4 * mega, 8 * mega, 16 * mega]
    assert [phase.seq_len for phase in ramp.phases] == [4096, 8192, 8192]
    assert [phase.num_micro_batches for phase in ramp.phases] == [16, 16, 32]
    # 252e6 / 4,194,304 = 60.08; (2.87e12 - 61 x 4,194,304) / 8,388,608 = 342,100.19
    assert ramp.first_steps() == [0, 61, 61 + 342_101]
    assert ramp.tokens_before(61) == 255_852_544
    assert ramp.tokens_before(NUM_STEPS - 1) < 15.6e12 <= ramp.tokens_before(NUM_STEPS)
    assert ramp.first_row(61) == 0 and ramp.first_row(62) == 1024 and ramp.first_row(342_162) == 342_101 * 1024


@st.composite
def ramps(draw):
    starts = sorted({0, *draw(st.lists(st.integers(1, 400), max_size=4))})
    return Ramp(tuple(Phase(start, draw(st.integers(1, 6)), draw(st.sampled_from([4, 8])), 1) for start in starts))


@given(ramps())
def test_any_ramp_against_counting(ramp):
    """Counted step by step: tokens, phases, and rows of each length, of which none is read twice or left out."""
    tokens, rows = 0, {4: 0, 8: 0}
    for step in range(80):
        expected = [phase for phase in ramp.phases if phase.from_tokens <= tokens][-1]
        phase = ramp.phase_at(step)
        assert phase == expected
        assert ramp.tokens_before(step) == tokens
        assert ramp.first_row(step) == rows[phase.seq_len]
        assert [ramp.rows_before(step, seq_len) for seq_len in rows] == list(rows.values())
        assert ramp.step_at(tokens) == step and ramp.step_at(tokens + 1) == step + 1
        tokens += phase.tokens_per_step
        rows[phase.seq_len] += phase.global_batch_size


@pytest.mark.parametrize("starts", [(5,), (0, 0), (0, 20, 10), (0, 10, 10)])
def test_starts_that_do_not_rise(starts):
    with pytest.raises(UserError, match=r"train.phases start from \[.*\] tokens"):
        Ramp(tuple(Phase(start, 2, 8, 1) for start in starts))


@pytest.mark.parametrize("name", ["global_batch_size", "seq_len", "num_micro_batches"])
def test_sizes_below_one(name):
    with pytest.raises(UserError, match=f"train.{name} is 0"):
        Phase(**{"from_tokens": 0, "global_batch_size": 4, "seq_len": 8, "num_micro_batches": 2, name: 0})


def test_micro_batches_that_do_not_divide():
    with pytest.raises(UserError, match="train.global_batch_size 4 does not divide by train.num_micro_batches 3"):
        Phase(0, 4, 8, 3)
