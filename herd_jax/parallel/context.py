"""Context parallelism: 2 * CP chunks of the sequence, rank i holds chunks i and 2 * CP - 1 - i, keys and values are all-gathered
(section 3.3.2 of the paper: not a ring, so that any mask works).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from herd_jax.parallel import collectives


def zigzag_order(seq_len: int, cp: int) -> np.ndarray:
    """Row order -> the order in which a sharded row lies on the mesh: `row[zigzag_order(S, cp)]` split in `cp` equal parts.

    `seq_len` must divide by 2 * cp.
    """
    chunks = np.arange(seq_len).reshape(2 * cp, -1)
    return np.concatenate([chunks[chunk] for rank in range(cp) for chunk in (rank, 2 * cp - 1 - rank)])


def row_index(num_tokens: int) -> jax.Array:
    """Index in the row of each of this device's `num_tokens` tokens: int32 [T]."""
    cp, rank = collectives.axis_size("cp"), lax.axis_index("cp")
    if cp == 1:
        return jnp.arange(num_tokens, dtype=jnp.int32)
    half = jnp.arange(num_tokens // 2, dtype=jnp.int32)
    return jnp.concatenate([rank * (num_tokens // 2) + half, (2 * cp - 1 - rank) * (num_tokens // 2) + half])


def gather_row(x: jax.Array, dim: int) -> jax.Array:
    """The whole row, in row order, of which each rank holds its two chunks along `dim`: T -> S = cp * T."""
    cp = collectives.axis_size("cp")
    if cp == 1:
        return x
    parts = jnp.moveaxis(lax.all_gather(x, "cp"), 0, dim)  # [..., cp, T, ...]
    shape = x.shape
    first, second = jnp.split(parts, 2, axis=dim + 1)
    ordered = jnp.concatenate([first, jnp.flip(second, axis=dim)], axis=dim)  # [..., 2 cp, T / 2, ...]
    return ordered.reshape(*shape[:dim], cp * shape[dim], *shape[dim + 1 :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_keys(x: jax.Array, dim: int) -> jax.Array:
    """`gather_row` for keys and values: their cotangents, sums over the cp ranks, are reduced in FP32."""
    return gather_row(x, dim)


def _gather_keys_forward(x, dim):
    return gather_row(x, dim), None


def _gather_keys_backward(dim, _, cotangent):
    if collectives.axis_size("cp") == 1:
        return (cotangent,)
    shape = list(cotangent.shape)
    shape[dim] //= collectives.axis_size("cp")
    transpose = jax.linear_transpose(lambda x: gather_row(x, dim), jax.ShapeDtypeStruct(tuple(shape), jnp.float32))
    return (transpose(cotangent.astype(jnp.float32))[0].astype(cotangent.dtype),)


gather_keys.defvjp(_gather_keys_forward, _gather_keys_backward)


def visible_range(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys that each query sees, in row order: int32 `start` and `end` shaped as `segment_ids` [..., T].

    A query sees its own segment up to itself: start is the first index of the segment in the row, end its own index + 1.
    A segment is a run of equal ids; they are gathered over cp once here, not per layer.
    """
    dim = segment_ids.ndim - 1
    row = gather_row(segment_ids, dim)
    index = lax.broadcasted_iota(jnp.int32, row.shape, dim)
    begins = jnp.concatenate([jnp.zeros_like(row[..., :1], bool), row[..., 1:] != row[..., :-1]], axis=dim)
    start_of = lax.cummax(jnp.where(begins, index, 0), axis=dim)
    mine = row_index(segment_ids.shape[-1])
    return start_of[..., mine], jnp.broadcast_to(mine + 1, segment_ids.shape)
