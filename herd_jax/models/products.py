"""Products with matrices of weights, forward and backward, in the orders in which no backend copies a large array."""

import jax
from jax import lax

from herd_jax.models.fp8 import Fp8Matrix
from herd_jax.parallel import ring
from herd_jax.parallel.tensor import Between


def project(x_BTD: jax.Array, weight: jax.Array | Fp8Matrix) -> jax.Array:
    """Multiplies [B, T, D] by [D, ...], or by a quantized matrix: returns [B, T, ...]."""
    if isinstance(weight, Fp8Matrix):
        return weight.product(x_BTD)
    y_RE = _product(x_BTD.reshape(-1, x_BTD.shape[-1]), weight.reshape(weight.shape[0], -1))
    return y_RE.reshape(*x_BTD.shape[:2], *weight.shape[1:])


def project_gathered(x_BTD: jax.Array, weight: jax.Array | Fp8Matrix, between: Between) -> jax.Array:
    """Does what `project` does with the tokens of all tp ranks, on the way into a block."""
    if between.overlaps and isinstance(weight, jax.Array):
        y_BTE = ring.gather_product(x_BTD, weight.reshape(weight.shape[0], -1))
        return y_BTE.reshape(*y_BTE.shape[:2], *weight.shape[1:])
    return project(between.gather(x_BTD), weight)


def project_reduced(x_BTE: jax.Array, weight: jax.Array | Fp8Matrix, between: Between) -> jax.Array:
    """Does what `project` does with this rank's part of the summed dim, and adds up over tp, on the way out of a block."""
    if between.overlaps and isinstance(weight, jax.Array):
        return ring.product_scatter(x_BTE, weight)
    return between.reduce(project(x_BTE, weight))


@jax.custom_vjp
def _product(x_RD, w_DE):
    """Multiplies R rows by a matrix. The backward that JAX derives transposes its results, for which XLA on a CPU copies the whole cotangent."""
    return multiply(x_RD, w_DE, x_RD.dtype)


def _product_forward(x_RD, w_DE):
    return _product(x_RD, w_DE), (x_RD, w_DE)


def _product_backward(residuals, dy_RE):
    x_RD, w_DE = residuals
    return multiply(dy_RE, w_DE.T, x_RD.dtype), gradient_of_matrix(x_RD, dy_RE, w_DE.dtype)


_product.defvjp(_product_forward, _product_backward)


def gradient_of_matrix(x_RD: jax.Array, dy_RE: jax.Array, dtype) -> jax.Array:
    """Returns the gradient of a matrix [D, E], summed over R rows in FP32. The narrower operand is the one that is transposed."""
    if x_RD.shape[1] <= dy_RE.shape[1]:
        return multiply(x_RD.T, dy_RE, dtype)
    return multiply(dy_RE.T, x_RD, dtype).T


def multiply(a_MK: jax.Array, b_KN: jax.Array, dtype) -> jax.Array:
    """Returns the product of two matrices as `dtype`, summed in FP32."""
    return lax.dot(a_MK, b_KN, preferred_element_type=dtype)
