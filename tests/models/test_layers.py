import jax
import jax.numpy as jnp
import numpy as np

from herd_jax.models.layers import look_up, rms_norm

NUM_TOKENS = 4096  # BF16 has 8 bits: a sum of ones in it ends at 256


def test_gradient_of_a_frequent_token_is_summed_in_float32():
    table = jnp.ones((3, 2), jnp.bfloat16)
    index, mine = jnp.full((1, NUM_TOKENS), 1), jnp.arange(NUM_TOKENS)[None] % 2 == 0
    gradient = jax.grad(lambda table: look_up(table, index, mine).astype(jnp.float32).sum())(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[0, 0], [NUM_TOKENS / 2] * 2, [0, 0]])


def test_gradient_of_a_norm_is_summed_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, NUM_TOKENS, 4)), jnp.bfloat16)
    loss = lambda w, x: rms_norm(x, w, 1e-5).astype(jnp.float32).sum()
    gradient = jax.jit(jax.grad(loss))(jnp.ones(4, jnp.bfloat16), x)
    exact = jax.grad(loss)(jnp.ones(4, jnp.float32), x.astype(jnp.float32))
    np.testing.assert_allclose(np.asarray(gradient, np.float32), exact, atol=0.2)


def test_norm_rounds_as_a_bfloat16_product_does():
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.bfloat16), jnp.asarray(rng.normal(size=16), jnp.bfloat16)
    x32 = x.astype(jnp.float32)
    normalised = (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rms_norm(x, w, 1e-5), np.float32), np.asarray(normalised * w, np.float32))
