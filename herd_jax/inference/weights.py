"""The weights of a model, held once. Scoring wants them as training stores them, all layers of a parameter in one array and sharded by FSDP;
decoding wants an array for each layer, whole over FSDP, because matrix-vector products would copy a slice of a stack at each step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from herd_jax.mesh import FSDP_AXES, fsdp_size, on_mesh
from herd_jax.models.llama import Llama
from herd_jax.models.params import Declaration, Layout, Stored, is_declaration, map_declarations, parameter_name
from herd_jax.parallel import data

PyTree = Any
Read = Callable[[str, Declaration, Stored], jax.Array]  # gives a parameter of that name as it is to be stored


class Weights:
    """Holds the weights of a model on a mesh, each pipeline rank with one chunk of layers, in the form that was asked for last.

    `read` gives them when they are first asked for, in that form. Going over to the other form takes one parameter at a time.
    """

    def __init__(self, model: Llama, layout: Layout, dtype: jnp.dtype, read: Read | None):
        self._declared, self.layout, self.dtype, self._read = model.declared, layout, dtype, read
        self._has_output = model.config.tie_embeddings  # the decoder's own, in the order of its product
        self._held: dict[str, jax.Array | list[jax.Array]] = {}  # by name; a list: apart

    @classmethod
    def of(cls, params: PyTree, model: Llama, layout: Layout, dtype: jnp.dtype) -> "Weights":
        """Returns weights that are there already, as training stores them; they are cast to `dtype` on the way to the decoder."""
        weights = cls(model, layout, dtype, None)
        weights._held = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        return weights

    def stacked(self) -> PyTree:
        """Returns the parameters as training stores them."""
        return self._tree(self._stacked)

    def apart(self) -> PyTree:
        """Returns the weights for the decoder, as `apart_specs` says: of each parameter of the layers a list, one array for each slot."""
        tree = self._tree(self._apart)
        tree["ends"] = jax.tree.map(lambda arrays: arrays[0], tree["ends"], is_leaf=lambda node: isinstance(node, list))
        if self._has_output:
            self._held.setdefault("output", self._transpose(tree["ends"]["embed"]["table"]))
            tree["output"] = self._held["output"]
        return tree

    def layer(self, name: str, layer: int | None) -> tuple[jax.Array, int | None, PartitionSpec]:
        """Returns the array that holds a layer of a parameter, the row where it lies there, and how the array is sharded."""
        declaration = self.declarations[name]
        held = self._held[name] if name in self._held else self._stacked(name, declaration)
        if isinstance(held, list):
            for array, stored in zip(held, self.layout.apart(declaration), strict=True):
                if layer is None or layer in stored.layers:
                    return array, layer if layer is None else stored.layers.tolist().index(layer), stored.spec
        stored = self.layout.stored(declaration)
        return held, None if layer is None else stored.layers.tolist().index(layer), stored.spec

    def _tree(self, form) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, d: form(parameter_name(path), d), self._declared, is_leaf=is_declaration)

    def _stacked(self, name: str, declaration: Declaration) -> jax.Array:
        self._held.pop("output", None)
        if name not in self._held:
            self._held[name] = self._read(name, declaration, self.layout.stored(declaration))
        elif isinstance(self._held[name], list):
            self._held[name] = self._stack(declaration)(self._held[name])
        return self._held[name]

    def _apart(self, name: str, declaration: Declaration) -> list[jax.Array]:
        if name not in self._held:
            self._held[name] = [self._read(name, declaration, stored) for stored in self.layout.apart(declaration)]
        elif not isinstance(self._held[name], list):
            self._held[name] = self._split(declaration)(self._held[name])
        return self._held[name]

    def _split(self, declaration: Declaration):
        """Returns the jitted function from a stacked parameter to one apart."""
        spec, apart = self.layout.spec(declaration), self.layout.apart(declaration)

        def split(shard):
            whole = data.gather_weights(shard, spec, declaration.dtype or self.dtype)
            return [whole[slot : slot + 1] for slot in range(len(apart))] if declaration.layers else [whole]

        return self._jit(split, (spec,), [stored.spec for stored in apart])

    def _stack(self, declaration: Declaration):
        """Returns the jitted function from a parameter apart to the stacked one."""
        spec, apart = self.layout.spec(declaration), self.layout.apart(declaration)

        def own(array):
            if FSDP_AXES not in spec or fsdp_size(self.layout.mesh) == 1:
                return array
            dim = tuple(spec).index(FSDP_AXES)
            size = array.shape[dim] // fsdp_size(self.layout.mesh)
            return lax.dynamic_slice_in_dim(array, lax.axis_index(FSDP_AXES) * size, size, dim)

        stack = lambda arrays: jnp.concatenate([own(array) for array in arrays]) if declaration.layers else own(arrays[0])
        return self._jit(stack, ([stored.spec for stored in apart],), spec)

    @functools.cached_property
    def _transpose(self):
        (table,) = self.layout.apart(self._declared["ends"]["embed"]["table"])
        return self._jit(lambda table_VD: table_VD.T, (table.spec,), PartitionSpec(*reversed(table.spec)))

    @functools.cached_property
    def declarations(self) -> dict[str, Declaration]:
        """Returns the declarations by name."""
        leaves = jax.tree_util.tree_leaves_with_path(self._declared, is_leaf=is_declaration)
        return {parameter_name(path): declaration for path, declaration in leaves}

    def _jit(self, function, in_specs, out_specs):
        return on_mesh(function, self.layout.mesh, in_specs, out_specs, self.dtype)


def apart_specs(model: Llama, layout: Layout) -> PyTree:
    """Returns the specs of `Weights.apart`; with a tied embedding there is an output matrix of its own, in the order of its product."""
    specs = lambda d: [stored.spec for stored in layout.apart(d)]
    ends = map_declarations(lambda d: specs(d)[0], model.declared["ends"])
    tied = {"output": PartitionSpec(None, "tp")} if model.config.tie_embeddings else {}
    return {"ends": ends, "layers": map_declarations(specs, model.declared["layers"])} | tied
