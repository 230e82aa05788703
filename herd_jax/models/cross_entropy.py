"""Cross-entropy over a vocabulary that is split over tp, in chunks of tokens: the FP32 logits [B, S, V] never exist.

The gradient of a sum of losses is known as soon as a chunk's logits are, so the forward finds it at once (as Liger kernels do) and the
backward only scales it: three matmuls, not four.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.models.log_probabilities import chunks, predict
from herd_jax.models.products import gradient_of_matrix, multiply


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(x_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array, vocab_size: int) -> jax.Array:
    """Returns the sum of the masked token losses in nats: FP32 scalar, equal on every tp rank.

    `x_BTD` is whole on every tp rank, `w_DV` is the rank's part of the output matrix; columns from `vocab_size` on are padding and are never
    predicted. The cotangent of `x_BTD` is this rank's part of a sum over the tp ranks.
    """
    loss, _ = _scan_chunks(x_BTD, w_DV, target_BT, mask_BT, vocab_size, with_gradient=False)
    return loss


def _forward(x_BTD, w_DV, target_BT, mask_BT, vocab_size):
    return _scan_chunks(x_BTD, w_DV, target_BT, mask_BT, vocab_size, with_gradient=True)


def _backward(vocab_size, gradients, cotangent):
    dx_BTD, dw_DV = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
    return dx_BTD, dw_DV, None, None


cross_entropy_sum.defvjp(_forward, _backward)


def _scan_chunks(x_BTD, w_DV, target_BT, mask_BT, vocab_size, with_gradient):
    num_tokens = target_BT.size
    rows = chunks(x_BTD, target_BT, mask_BT)
    num_chunks = len(rows[0])

    def one_chunk(carry, rows):
        loss, dw_DV = carry
        x_CD, target_C, mask_C = rows
        found = predict(x_CD, w_DV, target_C, vocab_size)
        loss += jnp.where(mask_C, jnp.log(found.total_C) + found.peak_C - found.hit_C, 0).sum()
        if not with_gradient:
            return (loss, dw_DV), None
        dlogits_CV = jnp.where(mask_C[:, None], found.exp_CV / found.total_C[:, None] - found.one_hot_CV, 0).astype(x_CD.dtype)
        dw_DV += gradient_of_matrix(x_CD, dlogits_CV, jnp.float32)
        return (loss, dw_DV), multiply(dlogits_CV, w_DV.T, x_CD.dtype)

    dw_DV = jnp.zeros(w_DV.shape, jnp.float32) if with_gradient else jnp.zeros(())
    if num_chunks == 1:
        (loss, dw_DV), dx = one_chunk((jnp.zeros(()), dw_DV), jax.tree.map(lambda a: a[0], rows))
    else:
        (loss, dw_DV), dx = lax.scan(one_chunk, (jnp.zeros(()), dw_DV), rows)
    if not with_gradient:
        return loss, None
    dx_BTD = dx.reshape(-1, x_BTD.shape[-1])[:num_tokens].reshape(x_BTD.shape)
    return loss, (dx_BTD, dw_DV.astype(w_DV.dtype))
