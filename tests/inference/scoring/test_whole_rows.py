"""Scores of whole rows against the plain forward, on every kind of mesh."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.inference.scoring import whole_rows
from herd_jax.inference.scoring.whole_rows import Scorer


def plain(params, ids, config):
    """Logits [S, V] of one document."""
    rows = {"tokens": np.asarray(ids)[None], "segment_ids": np.ones((1, len(ids)), np.int32), "positions": np.arange(len(ids))[None]}
    return np.asarray(tiny.plain_logits(params, rows, config)[0])


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
