"""The training state: a pytree of step, FP32 master weights and optimizer state, how it lies on a mesh, and its canonical form in a checkpoint."""

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from herd_jax.models.params import Declaration, Layout, is_declaration, map_declarations

PyTree = Any


class State(NamedTuple):
    step: jax.Array  # int32, steps taken
    params: PyTree  # {"ends": {"embed": ..., "head": ...}, "layers": ...}, FP32
    optimizer: PyTree  # optax state


@dataclasses.dataclass(frozen=True)
class StatePlan:
    """Everything about the state that follows from the declarations, the optimizer and the layout on the mesh."""

    declared: PyTree
    optimizer: optax.GradientTransformation
    layout: Layout

    @functools.cached_property
    def declared_state(self) -> State:
        """Returns a state whose leaves are declarations, or None where there is nothing to shard (the counters)."""
        params = map_declarations(lambda d: jax.ShapeDtypeStruct(self.layout.stored_shape(d), jnp.float32), self.declared)
        optimizer = jax.eval_shape(self.optimizer.init, params)
        like_params = optax.tree_utils.tree_map_params(
            self.optimizer, lambda _, declaration: declaration, optimizer, self.declared,
            transform_non_params=lambda _: None, is_leaf=is_declaration,
        )  # fmt: skip
        return State(None, self.declared, like_params)

    def _map(self, f, *trees) -> State:
        leaf = lambda node: node is None or is_declaration(node)
        return jax.tree.map(f, self.declared_state, *trees, is_leaf=leaf)

    @property
    def specs(self) -> State:
        return self._map(lambda d: PartitionSpec() if d is None else self.layout.spec(d))

    @property
    def shardings(self) -> State:
        return self._map(lambda d: NamedSharding(self.layout.mesh, PartitionSpec() if d is None else self.layout.spec(d)))

    def init(self, seed: int) -> State:
        """Returns the state before the first step, made on its devices: the same on every mesh."""
        return self._init(jax.random.key(seed))

    @functools.cached_property
    def _init(self):
        def make(key):
            paths, tree = jax.tree_util.tree_flatten_with_path(self.declared, is_leaf=is_declaration)
            name = lambda path: zlib.crc32(jax.tree_util.keystr(path).encode())
            values = [self.layout.init(d, jax.random.fold_in(key, name(path))) for path, d in paths]
            params = jax.tree.unflatten(tree, values)
            return State(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

        return jax.jit(make, out_shardings=self.shardings)

    def at_its_beginning(self, canonical: State) -> State:
        """Returns a canonical state as that of a run that begins with it: at step 0, the clock of the schedule, with the moments and their age."""
        state = self.from_canonical(canonical)
        return state._replace(step=jax.device_put(np.int32(0), state.step.sharding))

    def abstract_canonical(self) -> State:
        """Returns shapes, dtypes and shardings of the canonical state, to restore a checkpoint onto this mesh."""

        def abstract(declaration):
            if declaration is None:
                return jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(self.layout.mesh, PartitionSpec()))
            sharding = self.layout.canonical_sharding(declaration)
            return jax.ShapeDtypeStruct(declaration.canonical_shape, jnp.float32, sharding=sharding)

        return self._map(abstract)

    def to_canonical(self, state: State) -> State:
        """Returns the state with layers in model order, nothing padded, the same for every mesh; leaves that are so already are not copied.

        Converts one leaf at a time, to keep temporaries small, and because CPU devices can block each other once 32 programs are under way.
        """

        def convert(declaration, value):
            if declaration is None or self.layout.is_canonical(declaration):
                return value
            return jax.block_until_ready(_to_canonical(self.layout, declaration)(value))

        return self._map(convert, state)

    def from_canonical(self, state: State) -> State:
        """Returns a canonical state as it is on this mesh, the inverse of `to_canonical`; also one leaf at a time."""

        def convert(declaration, value):
            return value if declaration is None else jax.block_until_ready(_from_canonical(self.layout, declaration)(value))

        return self._map(convert, state)


@functools.cache  # compiled once, not at every save
def _to_canonical(layout: Layout, declaration: Declaration):
    convert = functools.partial(layout.to_canonical, declaration)
    return jax.jit(convert, out_shardings=layout.canonical_sharding(declaration))


@functools.cache
def _from_canonical(layout: Layout, declaration: Declaration):
    convert = functools.partial(layout.from_canonical, declaration)
    return jax.jit(convert, out_shardings=layout.sharding(declaration))
