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

from herd_jax.parallel.split_backward import SplitBackward, origins

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

        def probe(weights, micro_batch, x_BTD):
            _, vjp = jax.vjp(lambda w, x: layer(w, x, micro_batch), weights, x_BTD)
            leaves, found["tree"] = jax.tree.flatten(vjp)
            return leaves

        jaxpr = jax.make_jaxpr(probe)(weights, micro_batch, x_BTD).jaxpr
        known = {var: i for i, var in enumerate(jaxpr.invars[: len(jax.tree.leaves((weights, micro_batch)))])}
        kept, sources = {}, []
        for var, origin in zip(jaxpr.outvars, origins(jaxpr), strict=True):
            if origin in known:
                sources.append(("known", known[origin]))
            else:  # one array may be the residual of several operations: store it once
                kept.setdefault(origin, (len(kept), jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)))
                sources.append(("stored", kept[origin][0]))
        return cls(layer, found["tree"], tuple(sources), tuple(shape for _, shape in kept.values()))

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
    ahead: bool = False  # `fetch` and `finish` communicate: they are to run beside the layers before and behind
    adds: bool = True  # gradients are added to those of micro-batches before; else there are none, and they are written

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
        return self._each(count, lambda i: at + i, lambda i, weights, x_BTD: self.vjp.layer(weights, x_BTD, micro_batch), x_BTD)

    def forward(self, store, slot, x_BTD, micro_batch, at, count) -> tuple[jax.Array, "Store"]:
        """Runs the layers as `apply` does, and writes the residuals to `slot` of `store`."""

        def body(i, weights, carry):
            x_BTD, store = carry
            x_BTD, residuals = self.vjp.forward(weights, x_BTD, micro_batch)
            return x_BTD, store.write(slot, i, residuals)

        return self._each(count, lambda i: at + i, body, (x_BTD, store))

    def backward(self, store, slot, dy_BTD, micro_batch, at, first, count, gradients) -> tuple[jax.Array, PyTree]:
        """Runs layers first + count - 1 .. first, of the chunk whose slots begin at `at`, backward. Returns the cotangent of the first one's
        input, and `gradients` (FP32, shaped as `weights`) with these layers' added."""
        late = self.ahead and isinstance(count, int)  # a layer's gradient is finished during the next one's backward
        index = lambda i: at + first + count - 1 - i

        def body(i, weights, carry):
            dy_BTD, gradients, before = carry
            if late:
                gradients = self._add(gradients, index(jnp.maximum(i - 1, 0)), before)
            dw, dx_BTD = self.vjp.backward(weights, store.read(slot, first + count - 1 - i), micro_batch, dy_BTD)
            return (dx_BTD, gradients, dw) if late else (dx_BTD, self._add(gradients, index(i), dw), None)

        before = jax.tree.map(lambda w: jnp.zeros(w.shape, w.dtype), jax.eval_shape(self.weights_of, 0)) if late else None
        dx_BTD, gradients, dw = self._each(count, index, body, (dy_BTD, gradients, before))
        return dx_BTD, self._add(gradients, index(count - 1), dw) if late else gradients

    def backward_input(self, store, slot, kept, kept_slot, dy_BTD, micro_batch, at, first, count) -> tuple[jax.Array, "Store"]:
        """Does what `backward` does, without the gradients: what they need is written to `kept_slot` of `kept`."""

        def body(i, weights, carry):
            dy_BTD, kept = carry
            layer = count - 1 - i
            split = self.vjp.split(weights, store.read(slot, first + layer), micro_batch, dy_BTD)
            dx_BTD, values = split.input_part(dy_BTD)
            return dx_BTD, kept.write(kept_slot, layer, values)

        return self._each(count, lambda i: at + first + count - 1 - i, body, (dy_BTD, kept))

    def backward_weight(self, store, slot, kept, kept_slot, x_BTD, micro_batch, at, first, count, gradients) -> PyTree:
        """Returns `gradients` with those added that `backward_input` left out; of `x_BTD` only the shape counts."""

        def body(i, weights, gradients):
            split = self.vjp.split(weights, store.read(slot, first + i), micro_batch, x_BTD)
            return self._add(gradients, at + first + i, split.weight_part(kept.read(kept_slot, i)))

        return self._each(count, lambda i: at + first + i, body, gradients)

    def _each(self, count, index: Callable, body: Callable, carry):
        """Runs body(i, weights of layer slot index(i), carry) for i from 0 to count - 1. Where weights are gathered, those of the next round are
        gathered during this one; a traced count may be 0, for which nothing is gathered ahead."""
        if not (self.ahead and isinstance(count, int) and count):
            return loop(count, lambda i, carry: body(i, self.weights_of(index(i)), carry), carry)

        def with_next(i, carry):
            carry, weights = carry
            following = self.weights_of(index(jnp.minimum(i + 1, count - 1)))
            return body(i, weights, carry), following

        return loop(count, with_next, (carry, self.weights_of(index(0))))[0]

    def _add(self, gradients, index, dw) -> PyTree:
        def add(total, dw):
            before = lax.dynamic_index_in_dim(total, index, keepdims=False) if self.adds else 0
            return _update(total, index, before + dw.astype(total.dtype))

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
