"""Reads the parameters of a model that lies on a mesh, one layer at a time, to write them."""

import functools

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from herd_jax.inference.weights import Weights
from herd_jax.mesh import on_mesh
from herd_jax.parallel import collectives


class MeshReader:
    """Gives the parameters as `Source.read` does. On the mesh of several processes, all of them read the same parameters in the same order."""

    def __init__(self, weights: Weights):
        self._weights = weights

    def __call__(self, name: str, layer: int | None = None) -> np.ndarray:
        array, row, spec = self._weights.layer(name, layer)
        whole = _on_host(array, row) if array.is_fully_addressable else np.asarray(self._gather(array, row, spec))
        return whole[tuple(map(slice, self._weights.declarations[name].shape))]

    def take_part(self, name: str, layer: int | None = None) -> None:
        """Takes part in the reading of what only other processes want."""
        array, row, spec = self._weights.layer(name, layer)
        if not array.is_fully_addressable:
            jax.block_until_ready(self._gather(array, row, spec))  # else memory would hold many

    def _gather(self, array: jax.Array, row: int | None, spec: PartitionSpec) -> jax.Array:
        return _gathering(self._weights.layout.mesh, spec, row is not None, self._weights.dtype)(array, row)


@functools.lru_cache(maxsize=64)
def _gathering(mesh: Mesh, spec: PartitionSpec, has_layers: bool, dtype):
    """Returns the jitted function from an array and a row of it to that row, whole on each device."""

    def gather(shard, row):
        axes = tuple(spec)
        if has_layers:
            own = lax.dynamic_index_in_dim(shard, row % len(shard))
            shard, axes = collectives.all_gather(own, "pp", 0)[row // len(shard)], axes[1:]
        for dim, split in enumerate(axes):
            shard = collectives.all_gather(shard, split, dim) if split else shard
        return shard

    return on_mesh(gather, mesh, (spec, PartitionSpec()), PartitionSpec(), dtype)


def _on_host(array: jax.Array, row: int | None) -> np.ndarray:
    """Puts a row together on the host: gathering on the devices would cost each of them the memory."""
    whole = np.empty(array.shape if row is None else array.shape[1:], array.dtype)
    for shard in array.addressable_shards:
        data, place = shard.data, shard.index
        if row is not None:
            first, last, _ = place[0].indices(len(array))
            if not first <= row < last:
                continue
            data, place = lax.dynamic_index_in_dim(data, row - first, keepdims=False), place[1:]
        if shard.replica_id == 0:
            whole[place] = data
    return whole
