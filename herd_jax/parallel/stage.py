"""The layers of one pipeline stage, forward and backward, with the vjp of a layer taken apart into arrays that can wait in slots.

`jax.vjp` returns a pytree whose leaves are the residuals. Those that *are* a weight or a part of the micro-batch are at hand when the
backward runs, so only the others are stored. Because the vjp is of one layer, the loops over layers are ours: their trip count may
differ between ranks (a slot without a layer costs no time), weights can be gathered layer by layer, and each layer's gradient is
finished as soon as it is known.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.parallel.split_backward import SplitBackward

PyTree = Any
LayerFunction = Callable[[PyTree, jax.Array, PyTree], jax.Array]  # (weights, x_BTD, micro-batch) -> x_BTD


@dataclasses.dataclass(frozen=True)
class LayerVjp:
    """How to take the vjp of one layer apart and put it together again, found by tracing the layer once."""

    layer: LayerFunction
    tree: Any  # of the vjp, as a pytree
    sources: tuple[tuple[str, int], ...]  # per leaf: ("known", index) or ("stored", index)
    stored: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def trace(cls, layer: LayerFunction, weights: PyTree, x_BTD: jax.Array, micro_batch: PyTree) -> "LayerVjp":
        """Traces `layer` on arrays, or shapes, of one layer."""
        found = {}

        def probe(weights, x_BTD, micro_batch):
            _, vjp = jax.vjp(lambda w, x: layer(w, x, micro_batch), weights, x_BTD)
            leaves, found["tree"] = jax.tree.flatten(vjp)
            known = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((weights, micro_batch)))}
            kept, sources = {}, []
            for leaf in leaves:
                if id(leaf) in known:
                    sources.append(("known", known[id(leaf)]))
                else:  # one array may be the residual of several operations: store it once
                    kept.setdefault(id(leaf), (len(kept), leaf))
                    sources.append(("stored", kept[id(leaf)][0]))
            found["sources"] = tuple(sources)
            return tuple(leaf for _, leaf in kept.values())

        stored = jax.eval_shape(probe, weights, x_BTD, micro_batch)
        return cls(layer, found["tree"], found["sources"], stored)

    def forward(self, weights: PyTree, x_BTD: jax.Array, micro_batch: PyTree) -> tuple[jax.Array, list[jax.Array]]:
        """Returns the layer's output and the residuals to store."""
        y_BTD, vjp = jax.vjp(lambda w, x: self.layer(w, x, micro_batch), weights, x_BTD)
        residuals = [None] * len(self.stored)
        for leaf, (kind, index) in zip(jax.tree.leaves(vjp), self.sources, strict=True):
            if kind == "stored":
                residuals[index] = leaf
        return y_BTD, residuals

    def backward(self, weights: PyTree, residuals: list[jax.Array], micro_batch: PyTree, dy_BTD: jax.Array):
        """Returns (gradient of the weights, cotangent of the layer's input)."""
        known = jax.tree.leaves((weights, micro_batch))
        leaves = [(known if kind == "known" else residuals)[index] for kind, index in self.sources]
        return jax.tree.unflatten(self.tree, leaves)(dy_BTD)

    def split(self, weights: PyTree, residuals: list[jax.Array], micro_batch: PyTree, dy_BTD: jax.Array) -> SplitBackward:
        """Returns `backward` in two parts; `dy_BTD` may be a shape."""
        return SplitBackward(lambda known, dy_BTD: self.backward(*known, dy_BTD), (weights, residuals, micro_batch), dy_BTD)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The stacked layers of a rank, how the weights of one are fetched, and what is done with its gradient."""

    vjp: LayerVjp
    weights: PyTree  # leaves [layer slots of the rank, ...]
    fetch: Callable[[PyTree], PyTree]  # one layer's leaves -> the weights to compute with
    finish: Callable[[PyTree], PyTree]  # one layer's gradient -> what is accumulated, shaped as `weights`

    def weights_of(self, index) -> PyTree:
        return self.fetch(jax.tree.map(lambda w: w[index], self.weights))

    def empty_store(self, num_slots: int, num_layers: int) -> "Store":
        """Returns slots for the residuals of `num_slots` micro-batches."""
        return Store.empty(self.vjp.stored, num_slots, num_layers)

    def empty_kept(self, num_slots: int, num_layers: int, x_BTD, micro_batch) -> "Store":
        """Returns slots for the cotangents kept between the two parts of a backward."""
        weights, shapes = jax.eval_shape(lambda: self.weights_of(0)), []

        def probe(weights, residuals, micro_batch, x_BTD):
            shapes.extend(self.vjp.split(weights, residuals, micro_batch, x_BTD).kept_shapes)
            return x_BTD

        if num_slots > 0:
            jax.eval_shape(probe, weights, list(self.vjp.stored), micro_batch, x_BTD)
        return Store.empty(shapes, num_slots, num_layers)

    def apply(self, x_BTD, micro_batch, at, count) -> jax.Array:
        """Runs the layers in `count` slots from `at`, and keeps no residuals."""
        return loop(count, lambda i, x: self.vjp.layer(self.weights_of(at + i), x, micro_batch), x_BTD)

    def forward(self, store, slot, x_BTD, micro_batch, at, count) -> tuple[jax.Array, "Store"]:
        """Runs the layers as `apply` does, and writes the residuals to `slot` of `store`."""

        def body(i, carry):
            x_BTD, store = carry
            x_BTD, residuals = self.vjp.forward(self.weights_of(at + i), x_BTD, micro_batch)
            return x_BTD, store.write(slot, i, residuals)

        return loop(count, body, (x_BTD, store))

    def backward(self, store, slot, dy_BTD, micro_batch, at, first, count, gradients) -> tuple[jax.Array, PyTree]:
        """Runs layers first + count - 1 .. first, of the chunk whose slots begin at `at`, backward. Returns the cotangent of the first one's
        input, and `gradients` (FP32, shaped as `weights`) with these layers' added."""

        def body(i, carry):
            dy_BTD, gradients = carry
            i = first + count - 1 - i
            dw, dx_BTD = self.vjp.backward(self.weights_of(at + i), store.read(slot, i), micro_batch, dy_BTD)
            return dx_BTD, self._add(gradients, at + i, dw)

        return loop(count, body, (dy_BTD, gradients))

    def backward_input(self, store, slot, kept, kept_slot, dy_BTD, micro_batch, at, first, count) -> tuple[jax.Array, "Store"]:
        """Does what `backward` does, without the gradients: what they need is written to `kept_slot` of `kept`."""

        def body(i, carry):
            dy_BTD, kept = carry
            i = count - 1 - i
            split = self.vjp.split(self.weights_of(at + first + i), store.read(slot, first + i), micro_batch, dy_BTD)
            dx_BTD, values = split.input_part(dy_BTD)
            return dx_BTD, kept.write(kept_slot, i, values)

        return loop(count, body, (dy_BTD, kept))

    def backward_weight(self, store, slot, kept, kept_slot, x_BTD, micro_batch, at, first, count, gradients) -> PyTree:
        """Returns `gradients` with those added that `backward_input` left out; of `x_BTD` only the shape counts."""

        def body(i, gradients):
            split = self.vjp.split(self.weights_of(at + first + i), store.read(slot, first + i), micro_batch, x_BTD)
            return self._add(gradients, at + first + i, split.weight_part(kept.read(kept_slot, i)))

        return loop(count, body, gradients)

    def _add(self, gradients, index, dw) -> PyTree:
        def add(total, dw):
            return _update(total, index, lax.dynamic_index_in_dim(total, index, keepdims=False) + dw.astype(total.dtype))

        return jax.tree.map(add, gradients, self.finish(dw))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Store:
    """Where values of each layer wait, by slot: leaves [num_slots * num_layers, ...].

    There are at least two rows. With one, XLA would see that the layer's index does not matter, and do the layer's work before the loop over
    layers, even where the loop takes no round.
    """

    rows: list[jax.Array]
    num_layers: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, shapes, num_slots: int, num_layers: int) -> "Store":
        return cls([lax.empty((max(2, num_slots * num_layers), *leaf.shape), leaf.dtype) for leaf in shapes], num_layers)

    def read(self, slot, layer) -> list[jax.Array]:
        return [rows[slot * self.num_layers + layer] for rows in self.rows]

    def write(self, slot, layer, values: list[jax.Array]) -> "Store":
        index = slot * self.num_layers + layer
        return Store([_update(rows, index, value) for rows, value in zip(self.rows, values, strict=True)], self.num_layers)


def _update(rows: jax.Array, index, value: jax.Array) -> jax.Array:
    """Returns `rows` with `value` at an index that is within them. `.at[].set` asks whether it is, so it reads and selects as well."""
    return lax.dynamic_update_index_in_dim(rows, value, index, 0)


def loop(count, body, carry):
    """Runs `lax.fori_loop` from 0; a traced `count` may differ between pipeline ranks."""
    return lax.fori_loop(0, count, body, carry)
