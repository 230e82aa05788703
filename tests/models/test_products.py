"""Products with weights: their gradients are those that JAX derives, and sums are of FP32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from herd_jax.models.products import gradient_of_matrix, project


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape_of_weight", [(6, 40), (40, 6), (8, 3, 5)])
def test_gradients_are_those_that_jax_derives(dtype, tolerance, shape_of_weight):
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD, weight = jax.random.normal(keys[0], (2, 7, shape_of_weight[0])), jax.random.normal(keys[1], shape_of_weight)
    dy = jax.random.normal(keys[2], (2, 7, *shape_of_weight[1:]))
    with jax.default_matmul_precision("highest"):
        y, vjp = jax.vjp(lambda x, w: jnp.tensordot(x, w, 1), x_BTD, weight)
        expected = (y, *vjp(dy))
    ours, vjp = jax.vjp(project, x_BTD.astype(dtype), weight.astype(dtype))
    for found, right in zip((ours, *vjp(dy.astype(dtype))), expected, strict=True):
        assert found.dtype == dtype and found.shape == right.shape
        np.testing.assert_allclose(found.astype(jnp.float32), right, rtol=tolerance, atol=tolerance * float(jnp.abs(right).max()))


def test_sums_are_of_float32():
    """A sum of 4,096 ones in BF16 would stop at 256."""
    ones = jnp.ones((4096, 8), jnp.bfloat16)
    assert gradient_of_matrix(ones, ones, jnp.bfloat16).tolist() == [[4096.0] * 8] * 8
