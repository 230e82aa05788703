"""Meshes, models and batches that nobody thought of, drawn at random, against autodiff through a plain forward."""

import dataclasses
import itertools
import random

import jax
import numpy as np
import pytest
import tiny

from herd_jax.parallel.schedule import PipelineConfig

MESHES = [mesh for mesh in itertools.product(range(1, 9), repeat=4) if 2 <= np.prod(mesh) <= 8]


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed < 3 else pytest.mark.slow) for seed in range(16)])
def test_random_layout(seed):
    draw = random.Random(seed)
    tp, cp, pp, dp = draw.choice(MESHES)
    num_kv_heads = tp * draw.choice((1, 2, 3))
    config = dataclasses.replace(
        tiny.CONFIG,
        dim=cp * dp * draw.choice((4, 6, 10)),
        num_layers=draw.randint(1, 7),
        num_heads=num_kv_heads * draw.choice((1, 2, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=draw.choice((2, 6, 8)),
        ffn_dim=tp * draw.choice((5, 12)),
        vocab_size=draw.randint(11, 97),
        tie_embeddings=draw.random() < 0.5,
    )
    num_micro_batches, seq_len = draw.randint(1, 6), 2 * tp * cp * draw.choice((1, 2, 3, 5))
    num_rows = num_micro_batches * dp * draw.choice((1, 2))
    rows = tiny.make_rows(seed, num_rows, seq_len, config.vocab_size, max_documents=min(4, seq_len))
    rows["loss_mask"][0, 0] = True
    options = {"gather": ("step", "layer"), "remat": ("none", "attention", "layer"), "attention": ("dense", "blockwise")}
    num_chunks = draw.choice((1, 2, 3)) if pp > 1 else 1
    schedule = draw.choice(("gpipe", "1f1b", "zero_bubble") if num_chunks == 1 else ("interleaved", "zero_bubble"))
    schedule = PipelineConfig(schedule, num_chunks, draw.randint(0, 4), overlap=draw.random() < 0.3)
    steps = tiny.make_steps(tp, cp, pp, dp, config=config, pipeline=schedule, **{name: draw.choice(values) for name, values in options.items()})
    loss, gradient = tiny.loss_and_gradient(steps, rows, num_micro_batches)
    expected_loss, expected = tiny.plain_loss_and_gradient(tiny.canonical_params(steps), rows, config)
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    tiny.assert_close(gradient, jax.tree.map(np.asarray, expected), 2e-5)
