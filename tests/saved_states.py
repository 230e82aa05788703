"""States as pytrees come, placed on meshes, for tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

CONFIG = {"mesh": {"tp": 2}, "sizes": [1, 2], "rate": 0.1}


def mesh(num_devices, shape=None):
    return Mesh(np.array(jax.devices()[:num_devices]).reshape(shape or (num_devices, 1)), ("x", "y"))


def place(tree, mesh, *specs):
    """The tree on the mesh; arrays of two dims take turns with the specs, others are replicated."""
    leaves, structure = jax.tree.flatten(tree)
    specs = [specs[index % len(specs)] if np.ndim(leaf) == 2 else P() for index, leaf in enumerate(leaves)]
    return structure.unflatten(
        [jax.device_put(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, specs, strict=True)]
    )


def make_state(seed=0):
    """A training state as pytrees come: a model of NNX, an optimizer of optax, BF16, int32, bool and scalars."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    params = nnx.state(nnx.Linear(16, 24, rngs=nnx.Rngs(seed)))
    return {
        "step": jnp.int32(seed),
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "half": jax.random.normal(next(keys), (24, 8), jnp.bfloat16),
        "counts": jax.random.randint(next(keys), (8, 8), -(2**31), 2**31 - 1),
        "mask": jax.random.bernoulli(next(keys), shape=(8, 8)),
        "special": jnp.array([[np.nan, np.inf], [-0.0, 1e-45]] * 4),
        "big": jax.random.normal(next(keys), (64, 256)),
    }


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
