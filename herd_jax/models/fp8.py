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
        """The layers that are FP8."""
        return tuple(range(1, num_layers - 1) if self.skip_ends else range(num_layers))


@jax.jit
def quantize_rowwise(w_FD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [F, D] -> (values e4m3 [F, D], scales FP32 [F]); the weights are about values * scales. A row is an output of the product.

    A row with what is not finite becomes NaN as a whole.
    """
    return _quantize(w_FD, jnp.inf, None)


def fp8_matmul(x_TD: jax.Array, weight: tuple[jax.Array, jax.Array], activation_bound: float | None = 1200.0, axis: str | None = None) -> jax.Array:
    """[T, D] by the weight of `quantize_rowwise` [F, D] -> [T, F], in the dtype of `x_TD`.

    The magnitudes of a row of `x_TD` beyond `activation_bound` saturate, infinity too; without a bound an infinite value makes its row NaN. NaN
    makes its row NaN. `axis`: the mesh axis over which D is sharded, whose devices scale a row alike; their results are still to be summed.
    """
    values_FD, scales_F = weight
    values_TD, scales_T = _quantize(x_TD, jnp.inf if activation_bound is None else activation_bound, axis)
    y_TF = lax.dot_general(values_TD, values_FD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (y_TF * scales_T[:, None] * scales_F).astype(x_TD.dtype)


def _quantize(x_TD: jax.Array, bound: float, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """(values e4m3, scales FP32 [T]) of the rows. XLA's cast gives NaN beyond 448, so they are clamped first; NaN stays."""
    x_TD = x_TD.astype(jnp.float32)
    maximum_T = jnp.max(jnp.abs(x_TD), axis=-1)
    maximum_T = maximum_T if axis is None else collectives.all_max(maximum_T, axis)
    maximum_T = jnp.clip(maximum_T, SMALLEST_MAXIMUM, bound)
    return jnp.clip(x_TD * (LARGEST / maximum_T)[:, None], -LARGEST, LARGEST).astype(DTYPE), maximum_T / LARGEST


def fp8_feed_forward(x_BTD, gate_up_2FD, gate_up_scales_2F, down_DF, down_scales_D, activation_bound: float | None) -> jax.Array:
    """SwiGLU by one device's share of a layer's weights: [B, T, D] -> partial sums [B, T, D], to be summed over tp."""
    F = gate_up_2FD.shape[1]
    gate_up = gate_up_2FD.reshape(2 * F, -1), gate_up_scales_2F.reshape(2 * F)
    gate_up_T2F = fp8_matmul(x_BTD.reshape(-1, x_BTD.shape[-1]), gate_up, activation_bound).reshape(-1, 2, F)
    h_TF = jax.nn.silu(gate_up_T2F[:, 0]) * gate_up_T2F[:, 1]
    return fp8_matmul(h_TF, (down_DF, down_scales_D), activation_bound, "tp").reshape(x_BTD.shape)
