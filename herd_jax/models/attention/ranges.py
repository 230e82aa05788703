"""The ranges of keys that queries see: pairs (start_BT, end_BT), int32; a query sees the keys start <= s < end."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Ranges = Sequence[tuple[jax.Array, jax.Array]]


def visible(ranges: Ranges, num_keys: int) -> jax.Array:
    """Returns which keys each query sees: bool [B, T, S]."""
    key = jnp.arange(num_keys)
    return functools.reduce(jnp.logical_or, ((start_BT[:, :, None] <= key) & (key < end_BT[:, :, None]) for start_BT, end_BT in ranges))


def sees_something(ranges: Ranges) -> jax.Array:
    """Returns which queries see a key at all: bool [B, T]."""
    return functools.reduce(jnp.logical_or, (start_BT < end_BT for start_BT, end_BT in ranges))
