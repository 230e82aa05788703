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
    """Returns the order in which a sharded row lies on the mesh: `row[zigzag_order(S, cp)]`, split in `cp` equal parts.

    `seq_len` must divide by 2 * cp.
    """
    chunks = np.arange(seq_len).reshape(2 * cp, -1)
    return np.concatenate([chunks[chunk] for rank in range(cp) for chunk in (rank, 2 * cp - 1 - rank)])


def row_index(num_tokens: int) -> jax.Array:
    """Returns the index in the row of each of this device's `num_tokens` tokens: int32 [T]."""
    cp, rank = collectives.axis_size("cp"), lax.axis_index("cp")
    if cp == 1:
        return jnp.arange(num_tokens, dtype=jnp.int32)
    half = jnp.arange(num_tokens // 2, dtype=jnp.int32)
    return jnp.concatenate([rank * (num_tokens // 2) + half, (2 * cp - 1 - rank) * (num_tokens // 2) + half])


def gather_row(x: jax.Array, dim: int) -> jax.Array:
    """Returns the whole row, in row order, of which each rank holds its two chunks along `dim`: T -> S = cp * T."""
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
    """Does what `gather_row` does, for keys and values: their cotangents, sums over the cp ranks, are reduced in FP32."""
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


def sum_over_rows(values_BT: jax.Array) -> jax.Array:
    """Returns the sums of whole rows, the same on every cp rank: [B, T, ...] -> [B, ...].

    Each cp rank computes the loss that is made from them, so each must count 1 / cp of it. Then the transpose of the psum, which is a psum,
    adds these shares of the cotangent up to the whole.
    """
    sums_B = values_BT.sum(1)
    return sums_B if collectives.axis_size("cp") == 1 else lax.psum(sums_B, "cp")


def visible_ranges(segment_ids: jax.Array, branch_ids: jax.Array | None = None) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Returns the ranges of keys that each query sees, in row order: of each range int32 `start` and `end`, shaped as `segment_ids` [..., T].

    A query sees its own segment up to itself: start is the first index of the segment in the row, end its own index + 1. A segment is a run
    of equal ids; they are gathered over cp once here, not per layer.

    With `branch_ids`, a segment is a trunk (branch 0) and then branches, runs of equal ids, that do not see each other: a query in a branch
    sees the trunk and its own branch up to itself, in two ranges. The reward model has such rows: a prompt and its responses.
    """
    dim = segment_ids.ndim - 1
    mine = row_index(segment_ids.shape[-1])
    own_end = jnp.broadcast_to(mine + 1, segment_ids.shape)
    index = lax.broadcasted_iota(jnp.int32, (*segment_ids.shape[:-1], segment_ids.shape[-1] * collectives.axis_size("cp")), dim)

    def first_of_run(*ids):
        rows = [gather_row(a, dim) for a in ids]
        changes = functools.reduce(jnp.logical_or, (row[..., 1:] != row[..., :-1] for row in rows))
        begins = jnp.concatenate([jnp.zeros_like(changes[..., :1]), changes], axis=dim)
        return lax.cummax(jnp.where(begins, index, 0), axis=dim)

    segment_start = first_of_run(segment_ids)[..., mine]
    if branch_ids is None:
        return ((segment_start, own_end),)
    own_start = first_of_run(segment_ids, branch_ids)
    # The trunk ends where the segment's first branch begins: the first start of a branch at or after the segment's own.
    in_trunk = gather_row(branch_ids, dim) == 0
    trunk_end = lax.cummax(jnp.where(in_trunk, index + 1, 0), axis=dim)[..., mine]
    trunk_end = jnp.where(branch_ids == 0, segment_start, jnp.maximum(trunk_end, segment_start))  # the trunk itself is one range
    return (own_start[..., mine], own_end), (segment_start, trunk_end)
