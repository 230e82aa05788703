"""Sampling against the plain forward: logits at every index, and the greedy continuation."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.training.sampling import logits_function, sample_ids


def plain(params, ids, config):
    """Logits [S, V] of one document."""
    rows = {"tokens": np.asarray(ids)[None], "segment_ids": np.ones((1, len(ids)), np.int32), "positions": np.arange(len(ids))[None]}
    return np.asarray(tiny.plain_logits(params, rows, config)[0])


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.tied()], ids=["untied", "tied"])
def test_against_plain_forward(config):
    steps = tiny.make_steps(config=config, attention="blockwise")
    params, canonical = steps.plan.init(0).params, tiny.canonical_params(steps)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 9).astype(np.int32)
    expected = plain(canonical, ids, config)
    logits = logits_function(steps, len(ids))
    for index in (0, 4, 8):
        np.testing.assert_allclose(logits(params, jnp.asarray(ids)[None], index)[0], expected[index], atol=1e-4)

    continued = list(ids[:3])
    for _ in range(5):
        continued.append(int(plain(canonical, continued, config)[-1].argmax()))
    new = sample_ids(steps, params, list(ids[:3]), 5, temperature=0, seed=0, stop_ids=())
    assert new == continued[3:]
    stop = new[2]
    assert sample_ids(steps, params, list(ids[:3]), 5, temperature=0, seed=0, stop_ids=(stop,)) == new[: new.index(stop)]


def test_temperature_draws_from_the_softmax_and_a_seed_repeats():
    steps = tiny.make_steps(attention="blockwise")
    params = steps.plan.init(0).params
    draw = lambda seed: sample_ids(steps, params, [1, 2, 3], 6, temperature=1.0, seed=seed, stop_ids=())
    assert draw(0) == draw(0) and draw(0) != draw(1)
    assert all(0 <= token < tiny.CONFIG.vocab_size for token in draw(2))
