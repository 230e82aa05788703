"""The one declaration of a parameter, from which everything else about it follows: its initial value, how it is sharded, how it lies in a
checkpoint, whether weight decay applies, how much memory it takes.

Declared shapes are those of the model (one layer, the true vocabulary); a `Layout` says how they are stored on a mesh: layers stacked
by pipeline stage, the vocabulary padded to a multiple of tp.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from herd_jax.mesh import FSDP_AXES, fsdp_size
from herd_jax.parallel import data
from herd_jax.parallel.schedule import split_layers

PyTree = Any
MESH_AXES = {"embed": FSDP_AXES, "kv_heads": "tp", "ffn": "tp", "vocab": "tp", "reward": "tp", "layers": "pp", None: None}


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A parameter of the model: FP32, `shape` and logical `axes` without the layers dim, `init(key, shape)` its first value.

    `dtype` is set only for a parameter that is always held in that dtype, and never cast to the one that is computed in.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    layers: tuple[int, ...] = ()  # the model's layers that have the parameter, in order; empty: it is outside the layers
    dtype: np.dtype | None = None

    @property
    def decays(self) -> bool:
        """Returns whether weight decay applies: to matrices only, not to norms."""
        return len(self.shape) > 1

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """Returns the shape in a checkpoint: layers in model order, nothing padded."""
        return (len(self.layers), *self.shape) if self.layers else self.shape

    @property
    def size(self) -> int:
        return math.prod(self.canonical_shape)


def declare(shape: tuple[int, ...], axes: tuple[str | None, ...], init, dtype=None) -> nnx.Param:
    """Returns a parameter of a Flax module: abstract, with its declaration as metadata."""
    assert len(shape) == len(axes)
    dtype = dtype and np.dtype(dtype)
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype or jnp.float32), declaration=Declaration(shape, axes, init, dtype=dtype))


def normal(std: float):
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def ones(key, shape):
    return jnp.ones(shape, jnp.float32)


def declarations(module: nnx.Module, layers: Sequence[int] = ()) -> tuple[nnx.GraphDef, dict[str, Declaration]]:
    """Returns the graph definition and the declarations of an abstract module, which stands for each of `layers`, as a flat dict by name."""
    graph, state = nnx.split(module)
    found = {name: variable.get_metadata()["declaration"] for name, variable in state.items()}
    return graph, stacked(found, layers)


def stacked(declared: dict[str, Declaration], layers: Sequence[int]) -> dict[str, Declaration]:
    """Returns the declarations with `layers` as the layers that have the parameters."""
    return {name: dataclasses.replace(declaration, layers=tuple(layers)) for name, declaration in declared.items()}


def bind(graph: nnx.GraphDef, weights: dict[str, jax.Array]) -> nnx.Module:
    """Returns the module with `weights`, or one device's share of them, in place of its parameters."""
    return nnx.merge(graph, nnx.State({name: nnx.Param(value) for name, value in weights.items()}))


def is_declaration(node) -> bool:
    return isinstance(node, Declaration)


def parameter_name(path) -> str:
    """Returns the name of a parameter, such as "layers.qkv", from its path in the tree of declarations."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def map_declarations(f, declared: PyTree, *trees: PyTree) -> PyTree:
    return jax.tree.map(f, declared, *trees, is_leaf=is_declaration)


def count(declared: PyTree) -> int:
    """Returns the number of parameters."""
    return sum(declaration.size for declaration in jax.tree.leaves(declared, is_leaf=is_declaration))


@dataclasses.dataclass(frozen=True)
class Stored:
    """How an array of a parameter lies on a mesh. `layers`: the model's layer in each row of it, -1 in an empty one; None outside the layers."""

    shape: tuple[int, ...]
    spec: PartitionSpec
    layers: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where parameters lie on a mesh with a pipeline of `layers_per_stage`."""

    mesh: Mesh
    num_chunks: int
    stages: tuple[Sequence[int], ...]  # layers of each stage, in stage order

    @classmethod
    def make(cls, mesh: Mesh, num_layers: int, num_chunks: int = 1) -> "Layout":
        return cls(mesh, num_chunks, tuple(split_layers(num_layers, mesh.shape["pp"] * num_chunks)))

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        return tuple(len(layers) for layers in self.stages)

    def slots(self, declaration: Declaration) -> np.ndarray:
        """Returns the model's layer in each slot of a stacked parameter, rank by rank and there chunk by chunk; -1 in an empty slot.

        A rank has slots only for layers that have the parameter, as many as the stage with the most of them needs.
        """
        return self._slots(declaration.layers)

    @functools.cache
    def _slots(self, layers: tuple[int, ...]) -> np.ndarray:
        stages, num_ranks = [[layer for layer in stage if layer in layers] for stage in self.stages], self.mesh.shape["pp"]
        num_slots = max(1, *map(len, stages))
        order = [chunk * num_ranks + rank for rank in range(num_ranks) for chunk in range(self.num_chunks)]
        return np.concatenate([np.pad(stages[s], (0, num_slots - len(stages[s])), constant_values=-1) for s in order]).astype(np.int32)

    def slots_of_stage(self, declared: dict[str, Declaration], stage: int) -> list[dict[str, int]]:
        """Returns, for each layer of a stage, the slot on the stage's rank of each parameter of `declared` that the layer has."""
        assert self.num_chunks == 1
        layers = self.stages[stage]
        before = lambda d, at: sum(layer in d.layers for layer in layers[:at])
        return [{name: before(d, at) for name, d in declared.items() if layer in d.layers} for at, layer in enumerate(layers)]

    def scan(self, function, x, weights: dict[str, jax.Array], declared: dict[str, Declaration], stage: int):
        """Runs `function(x, weights of a layer, index in the stage) -> (x, to keep)` over the layers of a stage; returns (x, what was kept, stacked).

        `weights` are stacked by a rank's slots. There is a loop for each run of layers that have the same parameters, so one for a plain model.
        """
        kept, slots = [], self.slots_of_stage(declared, stage)
        for _, run in itertools.groupby(enumerate(slots), lambda item: item[1].keys()):
            (first, places), *others = run

            def body(x, i, first=first, places=places):
                return function(x, {name: weights[name][place - first + i] for name, place in places.items()}, i)

            x, new = jax.lax.scan(body, x, jnp.arange(first, first + 1 + len(others)))
            kept.append(new)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)

    def gather(self, params: PyTree, declared: PyTree, dtype) -> PyTree:
        """Gathers one device's shards into weights whole over FSDP, in the compute dtype `dtype` where they have none of their own."""
        return map_declarations(lambda d, shard: data.gather_weights(shard, self.spec(d), d.dtype or dtype), declared, params)

    def is_canonical(self, declaration: Declaration) -> bool:
        """Returns whether the parameter is stored as a checkpoint has it."""
        return self._in_order(declaration) and self.stored_shape(declaration) == declaration.canonical_shape

    def _in_order(self, declaration: Declaration) -> bool:
        """Returns whether the slots hold the layers in order and none is empty."""
        return not declaration.layers or self.slots(declaration).tolist() == list(declaration.layers)

    def spec(self, declaration: Declaration) -> PartitionSpec:
        axes = (("layers",) if declaration.layers else ()) + declaration.axes
        return PartitionSpec(*(MESH_AXES[axis] for axis in axes))

    def sharding(self, declaration: Declaration) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(declaration))

    def stored_shape(self, declaration: Declaration) -> tuple[int, ...]:
        tp = self.mesh.shape["tp"]
        shape = tuple(-(-n // tp) * tp if axis == "vocab" else n for n, axis in zip(declaration.shape, declaration.axes))
        return (len(self.slots(declaration)), *shape) if declaration.layers else shape

    def stored(self, declaration: Declaration) -> Stored:
        """Returns how training stores a parameter: all its layers in one array, sharded by FSDP too."""
        return Stored(self.stored_shape(declaration), self.spec(declaration), self.slots(declaration) if declaration.layers else None)

    def apart(self, declaration: Declaration) -> list[Stored]:
        """Returns how decoding stores a parameter: an array for each slot of a pipeline rank, or one outside the layers, whole over FSDP."""
        stacked, num_ranks = self.stored(declaration), self.mesh.shape["pp"]
        spec = PartitionSpec(*(None if axes == FSDP_AXES else axes for axes in stacked.spec))
        if stacked.layers is None:
            return [Stored(stacked.shape, spec, None)]
        layers_PS = stacked.layers.reshape(num_ranks, -1)
        return [Stored((num_ranks, *stacked.shape[1:]), spec, layers_P) for layers_P in layers_PS.T]

    def init(self, declaration: Declaration, key: jax.Array) -> jax.Array:
        """Returns the first value as it is stored; the parameters are the same on every mesh. Empty slots and padding are zero."""
        shape = declaration.shape
        if declaration.layers:
            layers = jnp.asarray(self.slots(declaration))
            values = jax.vmap(lambda layer: declaration.init(jax.random.fold_in(key, layer), shape))(layers)
            values = jnp.where(layers.reshape(-1, *[1] * len(shape)) >= 0, values, 0)
        else:
            values = declaration.init(key, shape)
        return jnp.pad(values, [(0, stored - n) for stored, n in zip(self.stored_shape(declaration), values.shape)])

    def to_canonical(self, declaration: Declaration, stored: jax.Array) -> jax.Array:
        """Returns a stored parameter as a checkpoint has it."""
        if not self._in_order(declaration):
            slots = self.slots(declaration).tolist()
            stored = _rows(stored, [slots.index(layer) for layer in declaration.layers])
        return stored[tuple(slice(n) for n in declaration.canonical_shape)]

    def from_canonical(self, declaration: Declaration, canonical: jax.Array) -> jax.Array:
        """Returns a checkpoint's parameter as it is stored."""
        if not self._in_order(declaration):
            places = [declaration.layers.index(layer) if layer >= 0 else -1 for layer in self.slots(declaration).tolist()]
            canonical = _rows(canonical, places)
        return jnp.pad(canonical, [(0, stored - n) for stored, n in zip(self.stored_shape(declaration), canonical.shape)])

    def canonical_sharding(self, declaration: Declaration) -> NamedSharding:
        """Returns the sharding of a checkpoint's array: that of the stored one, except in dims that then no longer divide.

        Where the layers do not divide by pp, pp splits the dim that FSDP shards, so that no rank holds the layers of all ranks.
        """
        shape, spec, fsdp = declaration.canonical_shape, list(self.spec(declaration)), fsdp_size(self.mesh)
        sizes = {None: 1, "pp": self.mesh.shape["pp"], "tp": self.mesh.shape["tp"], FSDP_AXES: fsdp}
        for dim, axes in enumerate(spec):
            if len(declaration.layers) % sizes["pp"] and axes == FSDP_AXES and shape[dim] % (fsdp * sizes["pp"]) == 0:
                spec[dim] = (*FSDP_AXES, "pp")
            elif shape[dim] % sizes[axes]:
                spec[dim] = None
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def _rows(array: jax.Array, numbers: Sequence[int]) -> jax.Array:
    """Returns these rows of an array, zeros for -1: slices of neighbours joined, because the gather of a sharded array ends XLA 0.11's partitioner."""
    runs, first = [], 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != (numbers[i - 1] + 1 if numbers[first] >= 0 else -1):
            start, size = numbers[first], i - first
            runs.append(array[start : start + size] if start >= 0 else jnp.zeros((size, *array.shape[1:]), array.dtype))
            first = i
    return jnp.concatenate(runs)
