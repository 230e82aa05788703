"""Prefill and decode against the plain forward, on every kind of mesh."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.inference.decoder import Decoder
from herd_jax.inference.sampling import choose
from herd_jax.inference.scoring import whole_rows
from herd_jax.inference.scoring.whole_rows import Scorer
from herd_jax.inference.weights import Weights

MESHES = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 4, 1), (2, 2, 2, 1), (4, 1, 1, 2)]


def plain(params, ids, config):
    """Logits [S, V] of one document."""
    rows = {"tokens": np.asarray(ids)[None], "segment_ids": np.ones((1, len(ids)), np.int32), "positions": np.arange(len(ids))[None]}
    return np.asarray(tiny.plain_logits(params, rows, config)[0])


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("config", [tiny.CONFIG, pytest.param(tiny.tied(), marks=pytest.mark.slow)], ids=["untied", "tied"])
def test_prefill_and_decode_are_the_full_forward(mesh, config):
    """Rows of unequal length, padded on the left; four tokens after them."""
    steps = tiny.make_steps(*mesh, config=config)
    decoder, canonical = Decoder(steps.model, steps.layout, jnp.float32), tiny.canonical_params(steps)
    weights = Weights.of(steps.plan.init(0).params, steps.model, steps.layout, jnp.float32).apart()
    rng = np.random.default_rng(0)
    ids, padding = rng.integers(0, config.vocab_size, (3, 8)).astype(np.int32), np.array([0, 3, 7], np.int32)
    new = rng.integers(0, config.vocab_size, (4, 3)).astype(np.int32)
    logits, cache = decoder.prefill(16)(weights, ids, padding)
    found = [logits]
    for i in range(4):
        logits, cache = decoder.decode(weights, cache, new[i], padding, jnp.int32(8 + i))
        found.append(logits)
    for row in range(3):
        expected = plain(canonical, np.concatenate([ids[row, padding[row] :], new[:, row]]), config)[-5:]
        np.testing.assert_allclose(np.stack([np.asarray(step[row]) for step in found]), expected, atol=1e-4)


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 8, 1)])
def test_scores_are_those_of_the_plain_forward(mesh, monkeypatch):
    monkeypatch.setattr(whole_rows, "RANK_TOKENS", 32)  # one or two rows of a rank at once
    steps = tiny.make_steps(*mesh, attention="blockwise")
    params, canonical = steps.plan.init(0).params, tiny.canonical_params(steps)
    scorer, ids = Scorer(steps.model, steps.layout, jnp.float32), np.random.default_rng(0).integers(0, 61, (3, 21))
    expected = np.stack([plain(canonical, row, tiny.CONFIG) for row in ids])
    np.testing.assert_allclose(scorer.logits(params, ids), expected, atol=1e-4)
    shifted = expected[:, :-1] - np.log(np.exp(expected[:, :-1]).sum(-1, keepdims=True))
    losses = -np.take_along_axis(shifted, ids[:, 1:, None], -1)[..., 0]
    lengths = [(0, 21), (1, 2), (2, 17), (0, 18), (1, 9)]  # of two sizes, in no order
    sums = scorer.loss(params, [ids[row, :length] for row, length in lengths])
    np.testing.assert_allclose(sums, [losses[row, : length - 1].sum() for row, length in lengths], rtol=1e-5)


def test_draws_follow_the_softmax():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    many = jnp.repeat(logits, 4000, axis=0)
    share = lambda **options: np.bincount(np.asarray(choose(many, 0, 0, **options)), minlength=4) / 4000
    np.testing.assert_allclose(share(temperature=1.0, top_p=1.0, greedy=False, nucleus=False), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(share(temperature=1.0, top_p=0.7, greedy=False, nucleus=True), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(share(temperature=0.5, top_p=1.0, greedy=False, nucleus=False), np.square([0.5, 0.3, 0.15, 0.05]) / 0.365, atol=0.03)
    assert share(temperature=1.0, top_p=1.0, greedy=True, nucleus=False)[0] == 1
    assert share(temperature=1.0, top_p=1e-9, greedy=False, nucleus=True)[0] == 1  # the likeliest token is never cut


def test_a_row_draws_the_same_whatever_stands_beside_it():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 50)), jnp.float32)
    draw = lambda rows, seed=0, step=3: np.asarray(choose(logits[:rows], seed, step, 1.0, 1.0, greedy=False, nucleus=False))
    np.testing.assert_array_equal(draw(5)[:2], draw(2))
    assert (draw(5) != draw(5, seed=1)).any() and (draw(5) != draw(5, step=4)).any()
