"""The parts that models share: the norm, the look-up of tokens, and what the backward computes again."""

import functools

import jax
import jax.numpy as jnp

# Recomputes cheap operations in the backward rather than keep their results. Forward and backward run in separate loops, so XLA cannot merge
# the two computations of a value and need not be kept from it.
recompute = functools.partial(jax.checkpoint, prevent_cse=False)


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Normalises in FP32, then casts, then applies the weight. The last product is written in FP32 (it rounds to the same), so that the weight's
    gradient, a sum over all tokens, is accumulated in FP32."""
    x32 = x_BTD.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    cast = (x32 * scale).astype(x_BTD.dtype)
    return (cast.astype(jnp.float32) * weight_D.astype(jnp.float32)).astype(x_BTD.dtype)


@jax.custom_vjp
def look_up(table_VD: jax.Array, index_BT: jax.Array, mine_BT: jax.Array) -> jax.Array:
    """Returns the rows of the table at `index_BT`, 0 where `mine_BT` is false. The gradients of a token that occurs often are summed in FP32."""
    return jnp.where(mine_BT[..., None], table_VD[index_BT], 0)


def _look_up_forward(table_VD, index_BT, mine_BT):
    return look_up(table_VD, index_BT, mine_BT), (table_VD, index_BT, mine_BT)


def _look_up_backward(residuals, dx_BTD):
    table_VD, index_BT, mine_BT = residuals
    dx_BTD = jnp.where(mine_BT[..., None], dx_BTD.astype(jnp.float32), 0)
    return jnp.zeros(table_VD.shape, jnp.float32).at[index_BT].add(dx_BTD).astype(table_VD.dtype), None, None


look_up.defvjp(_look_up_forward, _look_up_backward)
