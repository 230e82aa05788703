"""The pipeline executor: runs any schedule table as one device's share (section 3.3.2 of the paper). It knows no model.

A tick is an operation (idle, forward or backward of one micro-batch through one stage) and an exchange with the neighbours in pp.
tp, cp and dp collectives may happen inside an operation: their groups share a pp rank, hence a branch. On one stage there is nothing
to schedule: each micro-batch runs forward and backward in turn.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from herd_jax.parallel import collectives
from herd_jax.parallel.schedule import Schedule, Table, plan_buffers
from herd_jax.parallel.stage import LayerFunction, Layers, LayerVjp

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """What the pipeline runs: functions of one device's share of the weights and of one micro-batch.

    `ends` are the weights outside the layers, a dict; `embed` is given those under `embed_keys`, `head` those under `head_keys`.
    """

    embed: Callable[[dict, PyTree], jax.Array]  # (ends, micro-batch) -> x_BTD
    layer: LayerFunction  # (weights of one layer, x_BTD, micro-batch) -> x_BTD
    head: Callable[[dict, jax.Array, PyTree], tuple[jax.Array, PyTree]]  # (ends, x_BTD, micro-batch) -> (scalar to minimise, sums)
    embed_keys: tuple[str, ...]
    head_keys: tuple[str, ...]
    layers_per_stage: tuple[int, ...]  # in stage order

    def layer_slots(self) -> int:
        """Layers that each stage has room for."""
        return max(1, *self.layers_per_stage)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How stored weights become weights to compute with, and gradients what is accumulated. Each pair maps dicts or layers of one shape
    to another; both pairs are the identity where that is done once, outside the pipeline."""

    fetch_ends: Callable[[dict], dict] = lambda ends: ends
    finish_ends: Callable[[dict], dict] = lambda gradient: gradient
    fetch_layer: Callable[[PyTree], PyTree] = lambda weights: weights
    finish_layer: Callable[[PyTree], PyTree] = lambda gradient: gradient


def evaluate(program: Program, ends: dict, layers: PyTree, micro_batches: PyTree, schedule: Schedule, exchange: Exchange) -> PyTree:
    """The head's sums over all micro-batches, forward only; the same on every pp rank, local over dp and cp.

    `layers`: leaves [layer slots of this rank, ...]; `micro_batches`: leaves [num_micro_batches, ...].
    """
    run = _Run(program, ends, layers, micro_batches, exchange, keep_residuals=False)

    def first(m):
        return program.embed(run.fetch(program.embed_keys), run.micro_batch(m))

    def head(x_BTD, m):
        return program.head(run.fetch(program.head_keys), x_BTD, run.micro_batch(m))[1]

    no_sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(head, run.x_BTD, 0))
    if schedule.num_ranks == 1:
        whole = lambda m: head(run.layers.apply(first(m), run.micro_batch(m), *run.span(0)), m)
        return lax.fori_loop(0, schedule.num_micro_batches, lambda m, sums: jax.tree.map(jnp.add, sums, whole(m)), no_sums)

    table = plan_buffers(schedule)

    def tick(carry, row):
        activations, sums = carry
        do = dict(zip(Table.COLUMNS, row))

        def forward():
            x_BTD = lax.cond(run.is_first(do["chunk"]), lambda: first(do["micro_batch"]), lambda: activations[do["activation"]])
            y_BTD = run.layers.apply(x_BTD, run.micro_batch(do["micro_batch"]), *run.span(do["chunk"]))
            more = lax.cond(run.is_last(do["chunk"]), lambda: head(y_BTD, do["micro_batch"]), lambda: no_sums)
            return y_BTD, jax.tree.map(jnp.add, sums, more)

        y_BTD, sums = lax.cond(do["operation"] > 0, forward, lambda: (jnp.zeros_like(run.x_BTD), sums))
        activations = _receive(activations, do["arriving_activation"], collectives.shift(y_BTD, "pp", 1))
        return (activations, sums), None

    (_, sums), _ = lax.scan(tick, (run.buffer(table.num_activation_slots), no_sums), _my_rows(table))
    return collectives.all_reduce(sums, "pp")


def value_and_gradient(
    program: Program, ends: dict, layers: PyTree, micro_batches: PyTree, schedule: Schedule, exchange: Exchange
) -> tuple[PyTree, dict, PyTree]:
    """(the head's sums, gradient of `ends`, gradient of `layers`), summed over micro-batches, accumulated in FP32.

    Sums are local over dp and cp and equal on every pp rank. Gradients are shaped as `ends` and `layers`, and as far summed over
    devices as `exchange` does it; the gradient of `ends` is still to be summed over pp.
    """
    run = _Run(program, ends, layers, micro_batches, exchange, keep_residuals=True)

    def first(m):
        return program.embed(run.fetch(program.embed_keys), run.micro_batch(m))

    def accumulate(totals, gradients):
        add = lambda total, gradient: total + gradient.astype(total.dtype)
        return {**totals, **jax.tree.map(add, pick(totals, tuple(gradients)), exchange.finish_ends(gradients))}

    def head(x_BTD, m, d_ends, sums):
        """Cotangent of the last activation; the loss, its gradient and the head's weights' are found together."""
        both = jax.value_and_grad(program.head, argnums=(0, 1), has_aux=True)
        (_, more), (dw, dx_BTD) = both(run.fetch(program.head_keys), x_BTD, run.micro_batch(m))
        return dx_BTD, accumulate(d_ends, dw), jax.tree.map(jnp.add, sums, more)

    def embed_backward(dx_BTD, m, d_ends):
        _, vjp = jax.vjp(lambda w: program.embed(w, run.micro_batch(m)), run.fetch(program.embed_keys))
        return accumulate(d_ends, vjp(dx_BTD)[0])

    sums_shape = jax.eval_shape(lambda: program.head(run.fetch(program.head_keys), run.x_BTD, run.micro_batch(0))[1])
    no_sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums_shape)
    d_ends, d_layers = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), (ends, layers))
    num_slots = max(program.layer_slots(), 1)

    if schedule.num_ranks == 1:

        def whole(m, carry):
            store, d_ends, d_layers, sums = carry
            y_BTD, store = run.layers.forward(store, 0, first(m), run.micro_batch(m), *run.span(0))
            dy_BTD, d_ends, sums = head(y_BTD, m, d_ends, sums)
            dx_BTD, d_layers = run.layers.backward(store, 0, dy_BTD, run.micro_batch(m), *run.span(0), d_layers)
            return store, embed_backward(dx_BTD, m, d_ends), d_layers, sums

        carry = (run.layers.empty_store(1, num_slots), d_ends, d_layers, no_sums)
        _, d_ends, d_layers, sums = lax.fori_loop(0, schedule.num_micro_batches, whole, carry)
        return sums, d_ends, d_layers

    table = plan_buffers(schedule)
    nothing = jnp.zeros_like(run.x_BTD)

    def tick(carry, row):
        activations, cotangents, *state = carry
        do = dict(zip(Table.COLUMNS, row))
        m, micro_batch, span = do["micro_batch"], run.micro_batch(do["micro_batch"]), run.span(do["chunk"])
        is_first, is_last = run.is_first(do["chunk"]), run.is_last(do["chunk"])

        def idle(cotangents, store, d_ends, d_layers, sums):
            return nothing, nothing, cotangents, store, d_ends, d_layers, sums

        def forward(cotangents, store, d_ends, d_layers, sums):
            x_BTD = lax.cond(is_first, lambda: first(m), lambda: activations[do["activation"]])
            y_BTD, store = run.layers.forward(store, do["residual"], x_BTD, micro_batch, *span)
            cotangents = _receive(cotangents, jnp.where(is_last, do["cotangent"], -1), y_BTD)
            return y_BTD, nothing, cotangents, store, d_ends, d_layers, sums

        def backward(cotangents, store, d_ends, d_layers, sums):
            waiting = cotangents[do["cotangent"]]
            dy_BTD, d_ends, sums = lax.cond(
                is_last, lambda d_ends, sums: head(waiting, m, d_ends, sums), lambda *rest: (waiting, *rest), d_ends, sums
            )
            dx_BTD, d_layers = run.layers.backward(store, do["residual"], dy_BTD, micro_batch, *span, d_layers)
            d_ends = lax.cond(is_first, lambda d_ends: embed_backward(dx_BTD, m, d_ends), lambda d_ends: d_ends, d_ends)
            return nothing, dx_BTD, cotangents, store, d_ends, d_layers, sums

        y_BTD, dx_BTD, cotangents, *state = lax.switch(do["operation"], [idle, forward, backward], cotangents, *state)
        activations = _receive(activations, do["arriving_activation"], collectives.shift(y_BTD, "pp", 1))
        cotangents = _receive(cotangents, do["arriving_cotangent"], collectives.shift(dx_BTD, "pp", -1))
        return (activations, cotangents, *state), None

    start = (run.buffer(table.num_activation_slots), run.buffer(table.num_cotangent_slots),
             run.layers.empty_store(table.num_residual_slots, num_slots), d_ends, d_layers, no_sums)  # fmt: skip
    (_, _, _, d_ends, d_layers, sums), _ = lax.scan(tick, start, _my_rows(table))
    return collectives.all_reduce(sums, "pp"), d_ends, d_layers


class _Run:
    """What both executors need of one call: the rank's layers, its place in the pipeline, the shape of an activation."""

    def __init__(self, program: Program, ends, layers, micro_batches, exchange: Exchange, keep_residuals: bool):
        self.ends, self.exchange = ends, exchange
        self.num_ranks = collectives.axis_size("pp")
        self.num_chunks = len(program.layers_per_stage) // self.num_ranks
        self.slots = program.layer_slots()
        self.program, self.micro_batches = program, micro_batches
        x = jax.eval_shape(lambda: program.embed(self.fetch(program.embed_keys), self.micro_batch(0)))
        self.x_BTD = jnp.zeros(x.shape, x.dtype)
        one_layer = jax.eval_shape(lambda: exchange.fetch_layer(jax.tree.map(lambda w: w[0], layers)))
        micro_batch = jax.eval_shape(lambda: self.micro_batch(0))
        vjp = LayerVjp.trace(program.layer, one_layer, x, micro_batch) if keep_residuals else LayerVjp(program.layer, None, (), ())
        self.layers = Layers(vjp, layers, exchange.fetch_layer, exchange.finish_layer)

    def fetch(self, keys: tuple[str, ...]) -> dict:
        return self.exchange.fetch_ends(pick(self.ends, keys))

    def micro_batch(self, m):
        return jax.tree.map(lambda a: a[m], self.micro_batches)

    def span(self, chunk):
        """(first layer slot, number of layers) of a chunk on this rank; plain numbers where all ranks agree."""
        counts = np.array(self.program.layers_per_stage).reshape(self.num_chunks, self.num_ranks)
        if (counts == counts[0, 0]).all():
            return chunk * self.slots, int(counts[0, 0])
        return chunk * self.slots, jnp.asarray(counts)[chunk, lax.axis_index("pp")]

    def is_first(self, chunk):
        return (lax.axis_index("pp") == 0) & (chunk == 0)

    def is_last(self, chunk):
        return (lax.axis_index("pp") == self.num_ranks - 1) & (chunk == self.num_chunks - 1)

    def buffer(self, num_slots: int):
        return jnp.zeros((max(num_slots, 1), *self.x_BTD.shape), self.x_BTD.dtype)


def _my_rows(table: Table):
    return jnp.asarray(table.rows())[:, lax.axis_index("pp")]


def _receive(buffer, slot, value):
    """`buffer` with `value` in `slot`, unless slot is -1."""
    at = jnp.maximum(slot, 0)
    return buffer.at[at].set(jnp.where(slot >= 0, value, buffer[at]))


def pick(ends: dict, keys: tuple[str, ...]) -> dict:
    return {key: ends[key] for key in keys}
