"""Row-wise FP8 of the feed-forward (section 6.2 of the paper), with FBGEMM's arithmetic: each row of the weights, and at run time of the
activations, has a scale of its own, its largest magnitude over 448, the largest value of e4m3. Products of two FP8 values are summed in FP32.

On Hopper the product is an FP8 GEMM, for which both operands have the summed dim last. Elsewhere XLA widens them first, which is exact.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.parallel import collectives

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0  # of e4m3fn
SMALLEST_MAXIMUM = 1e-12  # of a row: one of zeros stays zeros


@dataclasses.dataclass(frozen=True)
class Fp8Config:
    """How a model's feed-forwards are FP8. `activation_bound`: magnitudes of activations beyond it saturate; None: none do. `skip_ends`: the
    first and the last layer keep their weights as they are."""

    activation_bound: float | None = 1200.0
    skip_ends: bool = True

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the layers that are FP8."""
        return tuple(range(1, num_layers - 1) if self.skip_ends else range(num_layers))


@jax.jit
def quantize_rowwise(w_FD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes weights [F, D] to (values e4m3 [F, D], scales FP32 [F]); the weights are about values * scales.

    A row is an output of the product. A row with a value that is not finite becomes NaN as a whole.
    """
    return _quantize(w_FD, jnp.inf, None)


def fp8_matmul(x_TD: jax.Array, weight: tuple[jax.Array, jax.Array], activation_bound: float | None = 1200.0, axis: str | None = None) -> jax.Array:
    """Multiplies [T, D] by the weight of `quantize_rowwise` [F, D]: returns [T, F] in the dtype of `x_TD`.

    The magnitudes of a row of `x_TD` beyond `activation_bound` saturate, infinity too; without a bound an infinite value makes its row NaN. NaN
    makes its row NaN. `axis`: the mesh axis over which D is sharded, whose devices scale a row alike; their results are still to be summed.
    """
    values_FD, scales_F = weight
    values_TD, scales_T = _quantize(x_TD, jnp.inf if activation_bound is None else activation_bound, axis)
    y_TF = lax.dot_general(values_TD, values_FD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (y_TF * scales_T[:, None] * scales_F).astype(x_TD.dtype)


def _quantize(x_TD: jax.Array, bound: float, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Returns (values e4m3, scales FP32 [T]) of the rows. XLA's cast gives NaN beyond 448, so they are clamped first; NaN stays."""
    x_TD = x_TD.astype(jnp.float32)
    maximum_T = jnp.max(jnp.abs(x_TD), axis=-1)
    maximum_T = maximum_T if axis is None else collectives.all_max(maximum_T, axis)
    maximum_T = jnp.clip(maximum_T, SMALLEST_MAXIMUM, bound)
    return jnp.clip(x_TD * (LARGEST / maximum_T)[:, None], -LARGEST, LARGEST).astype(DTYPE), maximum_T / LARGEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Matrix:
    """A quantized matrix, and how its product is computed: values e4m3 [..., D] and their scales FP32 [...], one for each output.

    `axis`: the mesh axis over which D is sharded, if any; the products of its devices are still to be summed.
    """

    values: jax.Array
    scales: jax.Array
    activation_bound: float | None = dataclasses.field(metadata={"static": True})
    axis: str | None = dataclasses.field(default=None, metadata={"static": True})

    def product(self, x_BTD: jax.Array) -> jax.Array:
        """Multiplies [B, T, D] by the matrix: returns [B, T, ...]."""
        weight = self.values.reshape(-1, self.values.shape[-1]), self.scales.reshape(-1)
        y_TF = fp8_matmul(x_BTD.reshape(-1, x_BTD.shape[-1]), weight, self.activation_bound, self.axis)
        return y_TF.reshape(*x_BTD.shape[:2], *self.scales.shape)
