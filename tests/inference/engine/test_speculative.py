"""Guesses change how fast an answer comes, and nothing else."""

import dataclasses

import engines
import numpy as np
import pytest
import tiny

from herd_jax.errors import UserError
from herd_jax.inference.engine.build import EngineConfig, make_engine
from herd_jax.inference.engine.requests import Request
from herd_jax.inference.sampling import Sampling

SMALL = dataclasses.replace(tiny.CONFIG, num_layers=2)


@pytest.mark.parametrize("mesh", [pytest.param((1, 1, 1, 1), marks=pytest.mark.slow), (2, 1, 1, 1)])
def test_a_draft_changes_no_answer(mesh):
    """A random one, whose guesses are nearly always wrong."""
    requests = engines.mixed_requests(7, seed=20)
    requests.append(Request(engines.ids(np.random.default_rng(1), 21), Sampling(6, temperature=1.0, seed=4), num_samples=3))
    engine = engines.engine(mesh, draft=(SMALL, 3), guesses=3, strict=True)
    for request, answers in zip(requests, engines.run(engine, requests), strict=True):
        assert [list(answer.ids) for answer in answers] == [engines.expected(request, sample) for sample in range(request.num_samples)]


def test_a_draft_that_is_right_is_worth_its_guesses():
    """The model as its own draft: each forward gives one token more than is guessed, greedy or drawn, unless the text ends."""
    engine = engines.engine(draft=(tiny.CONFIG, 0), guesses=3, strict=True)
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        request = Request(engines.ids(np.random.default_rng(2), 9), Sampling(17, **options))
        ticket, pieces = engine.submit(request), []
        while engine.has_work:
            pieces += [event.ids for event in engine.step() if event.ticket == ticket and hasattr(event, "log_probs") and hasattr(event, "_fields")]
        assert [len(ids) for ids in pieces if ids] == [1, 4, 4, 4, 4]
        assert [token for ids in pieces for token in ids] == engines.expected(request)


def test_look_up_guesses_what_came_before():
    """A model that repeats itself: its answer comes in fewer steps than it has tokens."""
    engine = engines.engine(guesses=3, strict=True)
    request = Request([1, 2, 3] * 9, Sampling(30, logit_bias={token: 100.0 for token in (1,)}))
    ticket, steps = engine.submit(request), 0
    while engine.has_work:
        engine.step()
        steps += 1
    assert steps < 15


def test_drafts_that_do_not_belong():
    model = engines.parts()
    other = dataclasses.replace(tiny.CONFIG, vocab_size=60)
    with pytest.raises(UserError, match="the draft has other tokens than the model"):
        make_engine(model, EngineConfig(guesses=3), engines.parts(config=other))
    with pytest.raises(UserError, match="guesses is 0, so the draft would have nothing to do"):
        make_engine(model, EngineConfig(), engines.parts(config=SMALL))
    with pytest.raises(UserError, match="the draft is on another mesh"):
        make_engine(model, EngineConfig(guesses=3), engines.parts((2, 1, 1, 1), SMALL))
    with pytest.raises(UserError, match="use pp 1, or guesses by look-up"):
        make_engine(engines.parts((1, 1, 2, 1)), EngineConfig(guesses=3, max_sequences=2), engines.parts((1, 1, 2, 1), SMALL))
