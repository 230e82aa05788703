"""Tensor parallelism with sequence parallelism: between blocks a device holds T / tp tokens, inside them all T and a part of the heads,
the feed-forward dim or the vocabulary (Megatron-LM's scheme; section 3.3.2 of the paper).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.parallel import collectives


def gather_sequence(x_BTD: jax.Array) -> jax.Array:
    """Gathers [B, T / tp, D] to [B, T, D], on the way into a block. Its transpose sums the partial cotangents of the tp ranks."""
    return collectives.all_gather(x_BTD, "tp", dim=1)


def scatter_sequence(x_BTD: jax.Array) -> jax.Array:
    """Adds up partial sums [B, T, D] over tp and returns this rank's part [B, T / tp, D], on the way out of a block."""
    return collectives.reduce_scatter(x_BTD, "tp", dim=1)


@jax.custom_vjp
def sum_of_parts(parts: jax.Array) -> jax.Array:
    """Adds up the tp ranks' parts of a value that all of them go on with; the cotangent of each part is that of the sum."""
    return collectives.all_reduce(parts, "tp")


sum_of_parts.defvjp(lambda parts: (sum_of_parts(parts), None), lambda _, cotangent: (cotangent,))


def vocabulary_slice(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the indices of token ids in this rank's `size` rows of the vocabulary (clipped to them), and whether each id is among them."""
    local = ids - lax.axis_index("tp") * size
    return jnp.clip(local, 0, size - 1), (local >= 0) & (local < size)


class Between(NamedTuple):
    """What tp ranks do between blocks: `gather` on the way into one, `reduce` of its partial sums on the way out. `overlaps`: both are taken apart
    with the product beside them (`parallel/ring.py`)."""

    gather: Callable[[jax.Array], jax.Array]
    reduce: Callable[[jax.Array], jax.Array]
    overlaps: bool = False


def _sum_in_fp32(x_BTD: jax.Array) -> jax.Array:
    return collectives.all_reduce(x_BTD.astype(jnp.float32), "tp").astype(x_BTD.dtype)


SPLIT_SEQUENCE = Between(gather_sequence, scatter_sequence)  # between blocks a rank holds T / tp tokens: training
OVERLAPPED_SEQUENCE = SPLIT_SEQUENCE._replace(overlaps=True)
WHOLE_SEQUENCE = Between(lambda x_BTD: x_BTD, _sum_in_fp32)  # it holds all of them, however few: inference


def split_sequence() -> Between:
    """Returns how training does it here: overlapped where GPUs send beside their matmuls.

    Not between pipeline stages: a permutation is one operation of all devices, and stages do not run the same number of layers at a time.
    """
    overlaps = collectives.axis_size("tp") > 1 and collectives.axis_size("pp") == 1 and jax.default_backend() == "gpu"
    return OVERLAPPED_SEQUENCE if overlaps else SPLIT_SEQUENCE
