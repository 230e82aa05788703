"""Log-probabilities over a vocabulary that is split over tp, in chunks of tokens: the FP32 logits [B, S, V] never exist.

On each tp rank `x_BTD` is whole and `w_DV` its part of the output matrix, whose columns from `vocab_size` on are padding and never
predicted. Results are equal on every tp rank; the cotangent of `x_BTD` is this rank's part of a sum over the tp ranks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.models.products import gradient_of_matrix, multiply
from herd_jax.parallel import collectives, tensor

CHUNK_TOKENS = 2048  # enough that the running gradient of the weights, read and written for each chunk, costs less than its matmul


class Predictions(NamedTuple):
    """What a model says of the targets of C tokens, of which this rank has the logits of its V columns."""

    logits_CV: jax.Array
    exp_CV: jax.Array  # of the logits less the peak
    peak_C: jax.Array  # the largest logit of all ranks
    total_C: jax.Array  # the sum of the exponentials of all ranks
    hit_C: jax.Array  # the target's logit
    index_C: jax.Array  # the target's column
    mine_C: jax.Array  # whether it is one of this rank's

    @property
    def log_p_C(self) -> jax.Array:
        return self.hit_C - self.peak_C - jnp.log(self.total_C)

    @property
    def one_hot_CV(self) -> jax.Array:
        return (jnp.arange(self.logits_CV.shape[1]) == self.index_C[:, None]) & self.mine_C[:, None]


def predict(x_CD: jax.Array, w_DV: jax.Array, target_C: jax.Array, vocab_size: int) -> Predictions:
    """Computes the logits of one chunk of tokens, and what the ranks together know of them."""
    logits_CV = jnp.where(columns(w_DV) < vocab_size, multiply(x_CD, w_DV, jnp.float32), -jnp.inf)
    peak_C = collectives.all_max(logits_CV.max(-1), "tp")
    exp_CV = jnp.exp(logits_CV - peak_C[:, None])
    index_C, mine_C = tensor.vocabulary_slice(target_C, w_DV.shape[1])
    hit_C = jnp.where(mine_C, jnp.take_along_axis(logits_CV, index_C[:, None], -1)[:, 0], 0)
    total_C, hit_C = collectives.all_reduce((exp_CV.sum(-1), hit_C), "tp")
    return Predictions(logits_CV, exp_CV, peak_C, total_C, hit_C, index_C, mine_C)


def columns(w_DV: jax.Array) -> jax.Array:
    """Returns the token ids of this rank's columns."""
    return lax.axis_index("tp") * w_DV.shape[1] + jnp.arange(w_DV.shape[1])


def chunks(*arrays_BT) -> tuple[jax.Array, ...]:
    """Cuts arrays [B, T, ...] into [chunks, tokens of a chunk, ...]; what fills up the last is 0."""
    num_tokens = arrays_BT[0].shape[0] * arrays_BT[0].shape[1]
    num_chunks = -(-num_tokens // CHUNK_TOKENS)
    chunk = -(-num_tokens // num_chunks)

    def split(a):
        flat = a.reshape(num_tokens, *a.shape[2:])
        padded = jnp.pad(flat, [(0, num_chunks * chunk - num_tokens)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(num_chunks, chunk, *flat.shape[1:])

    return tuple(map(split, arrays_BT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def log_probabilities(x_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array, vocab_size: int) -> jax.Array:
    """Returns the log-probability of each target: FP32 [B, T]. The backward computes the logits once more."""

    def one_chunk(_, rows):
        x_CD, target_C = rows
        return None, predict(x_CD, w_DV, target_C, vocab_size).log_p_C

    _, log_p = lax.scan(one_chunk, None, chunks(x_BTD, target_BT))
    return log_p.reshape(-1)[: target_BT.size].reshape(target_BT.shape)


def _forward(x_BTD, w_DV, target_BT, vocab_size):
    return log_probabilities(x_BTD, w_DV, target_BT, vocab_size), (x_BTD, w_DV, target_BT)


def _backward(vocab_size, residuals, weight_BT):
    x_BTD, w_DV, target_BT = residuals

    def one_chunk(dw_DV, rows):
        x_CD, target_C, weight_C = rows
        found = predict(x_CD, w_DV, target_C, vocab_size)
        dlogits_CV = ((found.one_hot_CV - found.exp_CV / found.total_C[:, None]) * weight_C[:, None]).astype(x_CD.dtype)
        return dw_DV + gradient_of_matrix(x_CD, dlogits_CV, jnp.float32), multiply(dlogits_CV, w_DV.T, x_CD.dtype)

    dw_DV, dx = lax.scan(one_chunk, jnp.zeros(w_DV.shape, jnp.float32), chunks(x_BTD, target_BT, weight_BT))
    dx_BTD = dx.reshape(-1, x_BTD.shape[-1])[: target_BT.size].reshape(x_BTD.shape)
    return dx_BTD, dw_DV.astype(w_DV.dtype), None


log_probabilities.defvjp(_forward, _backward)


def count_misses(x_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array, vocab_size: int) -> jax.Array:
    """Counts the masked targets that are not the likeliest token (of equally likely ones, the first): FP32 scalar."""

    def one_chunk(count, rows):
        x_CD, target_C, mask_C = rows
        found = predict(x_CD, w_DV, target_C, vocab_size)
        first_C = -collectives.all_max(-jnp.where(found.logits_CV == found.peak_C[:, None], columns(w_DV), vocab_size).min(-1), "tp")
        return count + (mask_C & (first_C != target_C)).sum(dtype=jnp.float32), None

    return lax.scan(one_chunk, jnp.zeros(()), chunks(x_BTD, target_BT, mask_BT))[0]
