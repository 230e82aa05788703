"""Attention in blocks, with its own backward pass: memory linear in sequence length, work only where the ranges allow it.

The forward pass walks over blocks of queries and, for each, over the blocks of keys that any of its queries can see, with the
running maximum and sum of an online softmax. The backward pass recomputes the probabilities of each pair of blocks from the
saved log-sum-exp. Both loops run at run time, so compile time does not depend on length. It is tuned for CPUs and runs anywhere;
the flash kernels for GPUs are in `gpu.py`.

Several ranges of keys are walked over one after the other, each with its own softmax, and their results are weighted by their shares in
the sum of all exponentials. The backward of each range then needs the joint log-sum-exp alone.

Method: "FlashAttention-2" (Dao, 2023), algorithms 1 and 2.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

MAX_SCORES = 2**19  # FP32 scores of one pair of blocks: 2 MiB, which still fits the caches of a core
MASKED = -1e30  # finite, so that a row with nothing to see never subtracts infinity from infinity

Keys = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # k_BSKH, v_BSKH, start_BT, end_BT: a query sees the keys start <= s < end


@jax.custom_vjp
def blockwise_attention(q_BTNH: jax.Array, keys: Sequence[Keys]) -> jax.Array:
    """Computes the attention of each query over all ranges of `keys`, which must not overlap for a query.

    See `attention.attention` for the contract. The keys of different ranges may be of different rows. A block of keys is computed only if some
    query of the block of queries, in any row of the micro-batch, can see it.
    """
    return _joint_forward(q_BTNH, keys)[0]


def _joint_forward(q_BTNH, keys):
    """Returns o_BTNH and the log-sum-exp of each query's scores over all ranges: lse_BKGT, T padded to whole blocks."""
    parts = [_forward(q_BTNH, *of) for of in keys]
    if len(parts) == 1:
        return parts[0]
    (B, T, N, _), found = q_BTNH.shape, []
    for (_, _, start_BT, end_BT), (_, lse_BKGT) in zip(keys, parts):
        sees_BT = jnp.pad(start_BT < end_BT, ((0, 0), (0, lse_BKGT.shape[-1] - T)))
        found.append(jnp.where(sees_BT[:, None, None], lse_BKGT, MASKED))  # where a query sees nothing, lse is 0, not the log of a sum
    most_BKGT = functools.reduce(jnp.maximum, found)
    shares = [jnp.exp(lse_BKGT - most_BKGT) for lse_BKGT in found]
    total_BKGT = sum(shares)
    to_heads = lambda a_BKGT: a_BKGT[..., :T].reshape(B, N, T).swapaxes(1, 2)[..., None]
    o_BTNH = sum(o.astype(jnp.float32) * to_heads(share / total_BKGT) for (o, _), share in zip(parts, shares))
    return o_BTNH.astype(q_BTNH.dtype), jnp.where(most_BKGT > MASKED, most_BKGT + jnp.log(total_BKGT), 0)


def _forward(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT):
    """Returns o_BTNH and the log-sum-exp of each query's scores, with T padded to whole blocks: lse_BKGT."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    block = _block_size(q_BTNH, k_BSKH)
    q, start, end = _pad(q_BTNH, block), _pad(start_BT, block), _pad(end_BT, block)
    k_BKSH, v_BKSH = _heads_first(_pad(k_BSKH, block)), _heads_first(_pad(v_BSKH, block))
    rows = N // K * block  # the query heads of one kv head are further rows of the same matrix

    def query_block(i, outputs):
        o, lse = outputs
        q_BKRH = _fold(_block(q, i, block), K)
        visible = _block(start, i, block), _block(end, i, block)

        def key_block(j, running):
            o_BKRH, max_BKR1, sum_BKR1 = running
            k_block, v_block = _block(k_BKSH, j, block, dim=2), _block(v_BKSH, j, block, dim=2)
            s_BKRs = _scores(q_BKRH, k_block, visible, j * block)
            new_max = jnp.maximum(max_BKR1, s_BKRs.max(-1, keepdims=True))
            p_BKRs = jnp.exp(s_BKRs - new_max)
            shrink = jnp.exp(max_BKR1 - new_max)
            o_BKRH = o_BKRH * shrink + _dot("bkrs,bksh->bkrh", p_BKRs.astype(v_block.dtype), v_block)
            return o_BKRH, new_max, sum_BKR1 * shrink + p_BKRs.sum(-1, keepdims=True)

        nothing = (jnp.zeros((B, K, rows, H)), jnp.full((B, K, rows, 1), MASKED), jnp.zeros((B, K, rows, 1)))
        o_BKRH, max_BKR1, sum_BKR1 = lax.fori_loop(*_key_blocks(visible, block), key_block, nothing)
        # Queries that see nothing: their scores are all MASKED, so their maximum is too.
        sees = max_BKR1 > MASKED
        o_BKRH = jnp.where(sees, o_BKRH / sum_BKR1, 0)
        lse_BKR1 = jnp.where(sees, max_BKR1 + jnp.log(sum_BKR1), 0)
        return _store(o, _unfold(o_BKRH, block).astype(o.dtype), i, 1), _store(lse, lse_BKR1.reshape(B, K, -1, block), i, 3)

    outputs = jnp.zeros_like(q), jnp.zeros((B, K, N // K, q.shape[1]))
    o, lse_BKGT = lax.fori_loop(0, q.shape[1] // block, query_block, outputs)
    return o[:, :T], lse_BKGT


def _forward_with_residuals(q_BTNH, keys):
    o_BTNH, lse_BKGT = _joint_forward(q_BTNH, keys)
    return o_BTNH, (q_BTNH, keys, o_BTNH, lse_BKGT)


def _joint_backward(residuals, do_BTNH):
    """Returns the gradients of q and of each range's k and v; the ranges have none."""
    q_BTNH, keys, o_BTNH, lse_BKGT = residuals
    parts = [_backward((q_BTNH, *of, o_BTNH, lse_BKGT), do_BTNH) for of in keys]
    dq_BTNH = parts[0][0] if len(parts) == 1 else sum(dq.astype(jnp.float32) for dq, *_ in parts).astype(q_BTNH.dtype)
    return dq_BTNH, type(keys)((dk, dv, None, None) for _, dk, dv in parts)


def _backward(residuals, do_BTNH):
    """Returns the gradients of q, k and v of one range, from the log-sum-exp over all."""
    q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, o_BTNH, lse_BKGT = residuals
    (B, T, _, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    block = _block_size(q_BTNH, k_BSKH)
    q, o, do, start, end = (_pad(x, block) for x in (q_BTNH, o_BTNH, do_BTNH, start_BT, end_BT))
    k_BKSH, v_BKSH = _heads_first(_pad(k_BSKH, block)), _heads_first(_pad(v_BSKH, block))

    def query_block(i, gradients):
        dq, dk_BKSH, dv_BKSH = gradients
        q_BKRH, o_BKRH, do_BKRH = (_fold(_block(x, i, block), K) for x in (q, o, do))
        visible = _block(start, i, block), _block(end, i, block)
        lse_BKR1 = _block(lse_BKGT, i, block, dim=3).reshape(B, K, -1, 1)
        delta_BKR1 = _dot("bkrh,bkrh->bkr", o_BKRH, do_BKRH)[..., None]

        def key_block(j, gradients):
            dq_BKRH, dk_BKSH, dv_BKSH = gradients
            k_block, v_block = _block(k_BKSH, j, block, dim=2), _block(v_BKSH, j, block, dim=2)
            p_BKRs = jnp.exp(_scores(q_BKRH, k_block, visible, j * block) - lse_BKR1)
            ds_BKRs = p_BKRs * (_dot("bkrh,bksh->bkrs", do_BKRH, v_block) - delta_BKR1) / math.sqrt(H)
            p_BKRs, ds_BKRs = p_BKRs.astype(v_block.dtype), ds_BKRs.astype(k_block.dtype)
            dk_BKSH = _add(dk_BKSH, _dot("bkrs,bkrh->bksh", ds_BKRs, q_BKRH), j)
            dv_BKSH = _add(dv_BKSH, _dot("bkrs,bkrh->bksh", p_BKRs, do_BKRH), j)
            return dq_BKRH + _dot("bkrs,bksh->bkrh", ds_BKRs, k_block), dk_BKSH, dv_BKSH

        gradients = jnp.zeros(q_BKRH.shape), dk_BKSH, dv_BKSH
        dq_BKRH, dk_BKSH, dv_BKSH = lax.fori_loop(*_key_blocks(visible, block), key_block, gradients)
        return _store(dq, _unfold(dq_BKRH, block).astype(dq.dtype), i, 1), dk_BKSH, dv_BKSH

    gradients = jnp.zeros_like(q), jnp.zeros(k_BKSH.shape), jnp.zeros(v_BKSH.shape)
    dq, dk_BKSH, dv_BKSH = lax.fori_loop(0, q.shape[1] // block, query_block, gradients)
    dk, dv = (_heads_first(x)[:, :S] for x in (dk_BKSH, dv_BKSH))
    return dq[:, :T], dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype)


blockwise_attention.defvjp(_forward_with_residuals, _joint_backward)


def _block_size(q_BTNH, k_BSKH) -> int:
    """Returns the power of two in 64 ... 256 whose scores fit MAX_SCORES, no longer than the sequence needs."""
    B, T, N, _ = q_BTNH.shape
    fitting = math.isqrt(MAX_SCORES // (B * N))
    needed = max(T, k_BSKH.shape[1])
    return min(max(64, 2 ** (fitting.bit_length() - 1)), 256, 2 ** (needed - 1).bit_length())


def _key_blocks(visible, block):
    """Returns the blocks of keys, first and one past the last, that hold every key that some query sees."""
    start_Bt, end_Bt = visible
    sees = start_Bt < end_Bt
    first = jnp.min(start_Bt, where=sees, initial=jnp.iinfo(start_Bt.dtype).max) // block
    return first, -(-jnp.max(end_Bt, where=sees, initial=0) // block)


def _scores(q_BKRH, k_BKsH, visible, first_key):
    """Returns the scaled FP32 scores of one pair of blocks, MASKED where the query does not see the key."""
    start_Bt, end_Bt = (x[:, None, None, :, None] for x in visible)
    s_BKRs = _dot("bkrh,bksh->bkrs", q_BKRH, k_BKsH) / math.sqrt(q_BKRH.shape[-1])
    B, K, _, num_keys = s_BKRs.shape
    key = first_key + jnp.arange(num_keys)
    s_BKGts = s_BKRs.reshape(B, K, -1, start_Bt.shape[3], num_keys)
    return jnp.where((start_Bt <= key) & (key < end_Bt), s_BKGts, MASKED).reshape(s_BKRs.shape)


def _dot(dims, x, y):
    return jnp.einsum(dims, x, y, preferred_element_type=jnp.float32)


def _pad(x_BT, block):
    """Pads with zeros to a whole number of blocks; padded ranges are empty, padded keys are in no range."""
    return jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % block)] + [(0, 0)] * (x_BT.ndim - 2))


def _heads_first(x_BSKH):
    return x_BSKH.swapaxes(1, 2)


def _fold(x_BtNH, K):
    """Reshapes [B, t, N, H] to [B, K, G * t, H]."""
    B, t, N, H = x_BtNH.shape
    return x_BtNH.reshape(B, t, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def _unfold(x_BKRH, t):
    """Reshapes [B, K, G * t, H] to [B, t, N, H]."""
    B, K, R, H = x_BKRH.shape
    return x_BKRH.reshape(B, K, R // t, t, H).transpose(0, 3, 1, 2, 4).reshape(B, t, -1, H)


def _block(x, i, block, dim=1):
    return lax.dynamic_slice_in_dim(x, i * block, block, dim)


def _store(x, x_block, i, dim):
    return lax.dynamic_update_slice_in_dim(x, x_block, i * x_block.shape[dim], dim)


def _add(x_BKSH, x_BKsH, j):
    return _store(x_BKSH, _block(x_BKSH, j, x_BKsH.shape[2], dim=2) + x_BKsH, j, 2)
