"""RoPE: frequencies with known answers, rotations against complex numbers, scores that depend on distance alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from herd_jax.models.config import MODELS
from herd_jax.models.rope import RopeScaling, frequencies, rotate, rotations


def test_known_scaling():
    """Llama 3.1: theta 5e5, head dim 128; ratio of scaled to unscaled frequency."""
    ratio = frequencies(128, 5e5, MODELS["llama3-8b"].rope_scaling) / frequencies(128, 5e5, None)
    assert ratio.shape == (64,)
    np.testing.assert_allclose(ratio[:29], 1, atol=1e-6)
    np.testing.assert_allclose(ratio[[29, 30, 32, 34]], [0.828168, 0.643743, 0.371122, 0.190211], atol=1e-6)
    np.testing.assert_allclose(ratio[35:], 0.125, atol=1e-6)
    assert (np.diff(ratio) <= 0).all()


def test_known_frequencies():
    np.testing.assert_allclose(frequencies(8, 1e4, None), [1, 1e-1, 1e-2, 1e-3], rtol=1e-12)


@pytest.mark.parametrize("name, factor", [("llama3-405b", 8), ("llama3.2-1b", 32), ("llama3.2-3b", 32)])
def test_scaling_of_the_released_models(name, factor):
    config = MODELS[name]
    scaled = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    plain = frequencies(config.head_dim, 5e5, None)
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / factor)


def test_factor_one_is_no_scaling():
    np.testing.assert_allclose(frequencies(64, 5e5, RopeScaling(factor=1.0)), frequencies(64, 5e5, None), rtol=1e-15)


def turned(x, positions, freqs):
    return rotate(x, *rotations(jnp.asarray(positions), freqs))


@pytest.mark.parametrize("head_dims", [(3,), (2, 3)])
def test_rotation_against_complex_numbers(head_dims):
    """The pair (i, i + H / 2) is a complex number, multiplied by exp(1j * position * frequency)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, *head_dims, 8)).astype(np.float32)
    positions = rng.integers(0, 8000, (2, 5))
    freqs = frequencies(8, 1e4, None)
    angle = (positions[..., None] * freqs).reshape(2, 5, *[1] * len(head_dims), 4)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    got = turned(jnp.asarray(x), positions, freqs)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.concatenate([expected.real, expected.imag], -1), atol=2e-3)  # angles to 8,000 in FP32
    near = turned(jnp.asarray(x), positions % 7, freqs)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * (positions[..., None] % 7 * freqs).reshape(angle.shape))
    np.testing.assert_allclose(near, np.concatenate([expected.real, expected.imag], -1), atol=1e-6)


def test_scores_depend_on_distance_alone():
    """q at p + d against k at p: the same score for every p, another for another d, unchanged at d = 0."""
    keys = jax.random.split(jax.random.key(0))
    q, k = (jax.random.normal(key, (1, 1, 1, 16)) for key in keys)
    freqs = frequencies(16, 5e5, RopeScaling())

    def score(q_position, k_position):
        return float(jnp.sum(turned(q, [[q_position]], freqs) * turned(k, [[k_position]], freqs)))

    for distance in (0, 1, 13):
        scores = [score(p + distance, p) for p in (0, 5, 100)]
        np.testing.assert_allclose(scores, scores[0], atol=2e-5)
    assert score(0, 0) == pytest.approx(float(jnp.sum(q * k)), abs=1e-6)
    assert abs(score(1, 0) - score(0, 1)) > 1e-3  # before and after differ


def test_rotation_is_in_fp32():
    """A BF16 head comes back in BF16, rounded once."""
    x = jax.random.normal(jax.random.key(1), (1, 6, 2, 8), jnp.bfloat16)
    positions, freqs = np.arange(1000, 1006)[None], frequencies(8, 1e4, None)
    got = turned(x, positions, freqs)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, turned(x.astype(jnp.float32), positions, freqs).astype(jnp.bfloat16))
