"""Fully sharded data parallelism over (dp, cp): weights are gathered in the compute dtype, gradients reduce-scattered in FP32
(section 3.3.2 of the paper).

A leaf's placement is its PartitionSpec: the dim that names the FSDP axes is the one gathered and scattered.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from herd_jax.mesh import FSDP_AXES
from herd_jax.parallel import collectives

GATHER = ("step", "layer")  # how often weights are gathered


def gather_weights(shards, specs, dtype):
    """Gathers one device's shards (a pytree) into weights whole over FSDP, in the compute dtype `dtype`; tp and pp parts stay parts."""

    def gather(shard, spec):
        dim = _fsdp_dim(spec)
        shard = shard.astype(dtype)
        return shard if dim is None else collectives.all_gather(shard, FSDP_AXES, dim)

    return jax.tree.map(gather, shards, specs)


def reduce_gradients(gradients, specs):
    """Reduces gradients of this device's tokens to FP32 sums over all tokens, sharded as the weights are (pp is not summed here)."""

    def reduce(gradient, spec):
        gradient, dim = gradient.astype(jnp.float32), _fsdp_dim(spec)
        if "tp" not in spec:  # used by every tp rank on its own part of the sequence
            gradient = collectives.all_reduce(gradient, "tp")
        return collectives.all_reduce(gradient, FSDP_AXES) if dim is None else collectives.reduce_scatter(gradient, FSDP_AXES, dim)

    return jax.tree.map(reduce, gradients, specs)


def _fsdp_dim(spec: PartitionSpec) -> int | None:
    return next((dim for dim, axes in enumerate(spec) if axes == FSDP_AXES), None)
