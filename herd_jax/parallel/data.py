"""Fully sharded data parallelism over (dp, cp): weights are gathered in the compute dtype, gradients reduce-scattered in FP32
(section 3.3.2 of the paper).

A leaf's placement is its PartitionSpec: the dim that names the FSDP axes is the one gathered and scattered. Stacks of layers are exchanged one
layer at a time, and other large leaves in parts: XLA transposes what it gathers or scatters along a dim that is not the first, and a whole stack of
the feed-forward is a quarter of all memory.
"""

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from herd_jax.mesh import FSDP_AXES
from herd_jax.parallel import collectives

GATHER = ("step", "layer")  # how often weights are gathered
_LARGE = 2**29  # bytes of a leaf above which it is exchanged in parts
_PARTS = 16  # of such a leaf, at most


def gather_weights(shards, specs, dtype):
    """Gathers one device's shards (a pytree) into weights whole over FSDP, in the compute dtype `dtype`; tp and pp parts stay parts."""

    def gather(shard, spec):
        dim = _fsdp_dim(spec)
        shard = shard.astype(dtype)
        return shard if dim is None else collectives.all_gather(shard, FSDP_AXES, dim)

    return _in_parts(gather, shards, specs, jnp.dtype(dtype).itemsize * collectives.axis_size(FSDP_AXES))


def reduce_gradients(gradients, specs):
    """Reduces gradients of this device's tokens to FP32 sums over all tokens, sharded as the weights are (pp is not summed here)."""

    def reduce(gradient, spec):
        gradient, dim = gradient.astype(jnp.float32), _fsdp_dim(spec)
        if "tp" not in spec:  # used by every tp rank on its own part of the sequence
            gradient = collectives.all_reduce(gradient, "tp")
        return collectives.all_reduce(gradient, FSDP_AXES) if dim is None else collectives.reduce_scatter(gradient, FSDP_AXES, dim)

    return _in_parts(reduce, gradients, specs, jnp.dtype(jnp.float32).itemsize)


def _in_parts(exchange: Callable, tree, specs, value_bytes: int):
    """Returns exchange(leaf, spec) of each leaf; all layers of a stack, and all parts of a large leaf, go one after another through one program.
    `value_bytes`: what a value of a leaf comes to, whole over FSDP."""
    if collectives.axis_size(FSDP_AXES) == 1:
        return jax.tree.map(exchange, tree, specs)
    leaves, structure = jax.tree.flatten(tree)
    specs = structure.flatten_up_to(specs)
    stacks, found = collections.defaultdict(list), {}
    for i, (leaf, spec) in enumerate(zip(leaves, specs)):
        if spec and spec[0] == "pp":
            stacks[len(leaf)].append(i)
        else:
            at_once = _fsdp_dim(spec) in (None, 0) or leaf.size * value_bytes < _LARGE
            found[i] = exchange(leaf, spec) if at_once else _part_by_part(exchange, leaf, spec)
    for group in stacks.values():
        found |= zip(group, _one_by_one(exchange, [leaves[i] for i in group], [specs[i] for i in group]))
    return structure.unflatten([found[i] for i in range(len(leaves))])


def _one_by_one(exchange: Callable, stacks: list[jax.Array], specs: list[PartitionSpec]) -> list[jax.Array]:
    of_layer = [PartitionSpec(*spec[1:]) for spec in specs]
    body = lambda _, layer: (None, [exchange(leaf, spec) for leaf, spec in zip(layer, of_layer)])
    return lax.scan(body, None, stacks)[1]


def _part_by_part(exchange: Callable, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    size = leaf.shape[0]
    num_parts = max(n for n in range(1, _PARTS + 1) if size % n == 0)
    parts = leaf.reshape(num_parts, size // num_parts, *leaf.shape[1:])
    (found,) = _one_by_one(exchange, [parts], [PartitionSpec(None, *spec)])
    return found.reshape(size, *found.shape[2:])


def _fsdp_dim(spec: PartitionSpec) -> int | None:
    return next((dim for dim, axes in enumerate(spec) if axes == FSDP_AXES), None)
