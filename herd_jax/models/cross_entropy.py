"""Cross-entropy over a vocabulary that is split over tp, in chunks of tokens: the FP32 logits [B, S, V] never exist.

The gradient of a sum of losses is known as soon as a chunk's logits are, so the forward finds it at once (as Liger kernels do) and the
backward only scales it: three matmuls, not four.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.parallel import collectives, tensor

CHUNK_TOKENS = 1024  # enough to keep the matmuls and the running gradient of the weights efficient


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(x_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array, vocab_size: int) -> jax.Array:
    """Sum of the masked token losses in nats: FP32 scalar, equal on every tp rank.

    `x_BTD` is whole on every tp rank, `w_DV` is the rank's part of the output matrix; columns from `vocab_size` on are padding and are never
    predicted. The cotangent of `x_BTD` is the rank's partial one.
    """
    loss, _ = _scan_chunks(x_BTD, w_DV, target_BT, mask_BT, vocab_size, with_gradient=False)
    return loss


def _forward(x_BTD, w_DV, target_BT, mask_BT, vocab_size):
    return _scan_chunks(x_BTD, w_DV, target_BT, mask_BT, vocab_size, with_gradient=True)


def _backward(vocab_size, gradients, cotangent):
    dx_BTD, dw_DV = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), gradients)
    return dx_BTD, dw_DV, None, None


cross_entropy_sum.defvjp(_forward, _backward)


def count_misses(x_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array, vocab_size: int) -> jax.Array:
    """How many masked targets are not the likeliest token (of equally likely ones, the first): FP32 scalar, equal on every tp rank."""
    num_columns = w_DV.shape[1]
    column = lax.axis_index("tp") * num_columns + jnp.arange(num_columns)

    def one_chunk(count, rows):
        x_CD, target_C, mask_C = rows
        logits_CV = jnp.where(column < vocab_size, jnp.dot(x_CD, w_DV, preferred_element_type=jnp.float32), -jnp.inf)
        peak_C = collectives.all_max(logits_CV.max(-1), "tp")
        first_C = -collectives.all_max(-jnp.where(logits_CV == peak_C[:, None], column, vocab_size).min(-1), "tp")
        return count + (mask_C & (first_C != target_C)).sum(dtype=jnp.float32), None

    return lax.scan(one_chunk, jnp.zeros(()), _chunks(x_BTD, target_BT, mask_BT))[0]


def _chunks(*arrays_BT) -> tuple[jax.Array, ...]:
    """Arrays [B, T, ...] as [chunks, tokens of a chunk, ...]; what fills up the last is 0."""
    num_tokens = arrays_BT[0].shape[0] * arrays_BT[0].shape[1]
    num_chunks = -(-num_tokens // CHUNK_TOKENS)
    chunk = -(-num_tokens // num_chunks)

    def split(a):
        flat = a.reshape(num_tokens, *a.shape[2:])
        padded = jnp.pad(flat, [(0, num_chunks * chunk - num_tokens)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(num_chunks, chunk, *flat.shape[1:])

    return tuple(map(split, arrays_BT))


def _scan_chunks(x_BTD, w_DV, target_BT, mask_BT, vocab_size, with_gradient):
    num_tokens, num_columns = target_BT.size, w_DV.shape[1]
    rows = _chunks(x_BTD, target_BT, mask_BT)
    num_chunks = len(rows[0])
    column = lax.axis_index("tp") * num_columns + jnp.arange(num_columns)

    def one_chunk(carry, rows):
        loss, dw_DV = carry
        x_CD, target_C, mask_C = rows
        logits_CV = jnp.where(column < vocab_size, jnp.dot(x_CD, w_DV, preferred_element_type=jnp.float32), -jnp.inf)
        peak_C = collectives.all_max(logits_CV.max(-1), "tp")
        exp_CV = jnp.exp(logits_CV - peak_C[:, None])
        index_C, mine_C = tensor.vocabulary_slice(target_C, num_columns)
        hit_C = jnp.where(mine_C, jnp.take_along_axis(logits_CV, index_C[:, None], -1)[:, 0], 0)
        total_C, hit_C = collectives.all_reduce((exp_CV.sum(-1), hit_C), "tp")
        loss += jnp.where(mask_C, jnp.log(total_C) + peak_C - hit_C, 0).sum()
        if not with_gradient:
            return (loss, dw_DV), None
        one_hot_CV = (jnp.arange(num_columns) == index_C[:, None]) & mine_C[:, None]
        dlogits_CV = jnp.where(mask_C[:, None], exp_CV / total_C[:, None] - one_hot_CV, 0).astype(x_CD.dtype)
        dw_DV += lax.dot_general(x_CD, dlogits_CV, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (loss, dw_DV), lax.dot_general(dlogits_CV, w_DV, (((1,), (1,)), ((), ())))

    dw_DV = jnp.zeros(w_DV.shape, jnp.float32) if with_gradient else jnp.zeros(())
    if num_chunks == 1:
        (loss, dw_DV), dx = one_chunk((jnp.zeros(()), dw_DV), jax.tree.map(lambda a: a[0], rows))
    else:
        (loss, dw_DV), dx = lax.scan(one_chunk, (jnp.zeros(()), dw_DV), rows)
    if not with_gradient:
        return loss, None
    dx_BTD = dx.reshape(-1, x_BTD.shape[-1])[:num_tokens].reshape(x_BTD.shape)
    return loss, (dx_BTD, dw_DV.astype(w_DV.dtype))
