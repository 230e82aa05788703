"""Checksums of the arrays of a state, computed on the devices, that do not depend on how the arrays are sharded."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from herd_jax.errors import Miscomputed

PyTree = Any


def leaf_types(state: PyTree) -> dict[str, str]:
    """Returns leaf name -> dtype and shape, such as "float32[4, 8]", in the order of the pytree; the leaves may be abstract."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def checksums(state: PyTree) -> dict[str, int]:
    """Returns leaf name -> checksum of the whole array. In a run of several processes all of them must call it (the sums go over devices).

    Raises Miscomputed, on every process, where devices have different copies of what should be the same.
    """
    names = list(leaf_types(state))
    here_DL = np.array([[shard.data for shard in value.addressable_shards] for value in _checksums(jax.tree.leaves(state))], np.uint32).T
    all_DL = np.asarray(multihost_utils.process_allgather(here_DL)).reshape(-1, len(names))
    unlike = np.flatnonzero((all_DL != all_DL[0]).any(axis=0))
    if len(unlike):
        raise Miscomputed(
            f"the copies of {names[unlike[0]]} that devices hold are not alike, so the memory of one is at fault: take its host out "
            "(train.verify_every_steps names it), and start again from the checkpoint before"
        )
    return dict(zip(names, all_DL[0].tolist(), strict=True))


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    """Computes all checksums in one program: with one program each, devices on CPU can block each other once 32 are under way."""
    return [checksum(leaf) for leaf in leaves]


@jax.jit
def checksum(array: jax.Array) -> jax.Array:
    """Returns a uint32: the sum, modulo 2**32, of each element's bits times an odd number made of its index.

    Addition has no order, so the sharding does not matter; the odd factor makes each change of one element count, and most swaps.
    """
    assert array.dtype.itemsize in (1, 2, 4) and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key), array.dtype
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = array.astype(unsigned) if array.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(array, unsigned)
    index = jnp.zeros(array.shape, jnp.uint32)
    for dim, size in enumerate(array.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def held_here(state: PyTree) -> int:
    """Returns a checksum of which parts of which leaves this process's devices hold; the leaves may be abstract, with shardings."""
    held = [
        sorted(str(index) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values())
        for leaf in jax.tree.leaves(state)
    ]
    return zlib.crc32(json.dumps(held).encode())


def sealed(record: dict) -> dict:
    """Returns the record as JSON reads it back, and a checksum of its text.

    The record keeps its order, since rows depend on the order of the sources; the checksum does not depend on it.
    """
    return {"record": json.loads(json.dumps(record)), "crc32": zlib.crc32(json.dumps(record, sort_keys=True).encode())}
