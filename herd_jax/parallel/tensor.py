"""Tensor parallelism with sequence parallelism: between blocks a device holds T / tp tokens, inside them all T and a part of the heads,
the feed-forward dim or the vocabulary (Megatron-LM's scheme; section 3.3.2 of the paper).
"""

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.parallel import collectives


def gather_sequence(x_BTD: jax.Array) -> jax.Array:
    """[B, T / tp, D] -> [B, T, D]: the way into a block. Its transpose sums the partial cotangents of the tp ranks."""
    return collectives.all_gather(x_BTD, "tp", dim=1)


def scatter_sequence(x_BTD: jax.Array) -> jax.Array:
    """[B, T, D] partial sums -> [B, T / tp, D]: the way out of a block."""
    return collectives.reduce_scatter(x_BTD, "tp", dim=1)


def vocabulary_slice(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Indices of token ids in this rank's `size` rows of the vocabulary, and whether they are among them (clipped where not)."""
    local = ids - lax.axis_index("tp") * size
    return jnp.clip(local, 0, size - 1), (local >= 0) & (local < size)
