"""The pipeline executor: runs any schedule table as one device's share (section 3.3.2 of the paper). It knows no model.

A tick is an operation (part of a forward or a backward of one micro-batch through one stage) and an exchange with the neighbours in pp.
A loop over layers takes no round in a tick that has another operation. tp, cp and dp collectives may happen inside an operation: the devices
of such a group share a pp rank, hence an operation. On one stage there is nothing to schedule: each micro-batch runs forward and backward in
turn.

Where the schedule's latency is 2, a tick sends the results of the tick before and needs what arrives only at its end, so a backend with
asynchronous communication (GPU, TPU) sends while it computes; on CPU devices an exchange waits for all ranks either way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.parallel import collectives
from herd_jax.parallel.schedule import Schedule
from herd_jax.parallel.stage import LayerFunction, Layers, LayerVjp
from herd_jax.parallel.table import COLUMNS, Table, lower

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
        """Returns how many layers each stage has room for."""
        return max(1, *self.layers_per_stage)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How stored weights become weights to compute with (`fetch`), and how a gradient becomes what is accumulated, shaped as the stored weights
    (`finish`): a pair for the ends and one for a layer. All are the identity where that is done once, outside the pipeline."""

    fetch_ends: Callable[[dict], dict] = lambda ends: ends
    finish_ends: Callable[[dict], dict] = lambda gradient: gradient
    fetch_layer: Callable[[PyTree], PyTree] = lambda weights: weights
    finish_layer: Callable[[PyTree], PyTree] = lambda gradient: gradient
    ahead: bool = False  # those of layers communicate


def evaluate(program: Program, ends: dict, layers: PyTree, micro_batches: PyTree, schedule: Schedule, exchange: Exchange) -> PyTree:
    """Returns the head's sums over all micro-batches, forward only; the same on every pp rank, local over dp and cp.

    `layers`: leaves [layer slots of this rank, ...]; `micro_batches`: leaves [num_micro_batches, ...].
    """
    run = _Execution(program, ends, layers, micro_batches, exchange, keep_residuals=False)

    def first(m):
        return program.embed(run.fetch(program.embed_keys), run.micro_batch(m))

    def head(x_BTD, m):
        return program.head(run.fetch(program.head_keys), x_BTD, run.micro_batch(m))[1]

    no_sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(head, run.x_BTD, 0))
    if schedule.num_ranks == 1:
        whole = lambda m: head(run.layers.apply(first(m), run.micro_batch(m), 0, program.layers_per_stage[0]), m)
        return lax.fori_loop(0, schedule.num_micro_batches, lambda m, sums: jax.tree.map(jnp.add, sums, whole(m)), no_sums)

    table = lower(schedule, program.layers_per_stage)

    def tick(carry, row):
        activations, sums = carry
        do = dict(zip(COLUMNS, row))
        m = do["micro_batch"]
        x_BTD = when(do["embed"], lambda _: first(m), activations[do["activation"]])
        y_BTD = run.layers.apply(x_BTD, run.micro_batch(m), do["layer_slot"], do["forward_count"])
        sums = when(do["head"], lambda sums: jax.tree.map(jnp.add, sums, head(y_BTD, m)), sums)
        activations = _receive(activations, do["arriving_activation"], collectives.shift(y_BTD, "pp", 1))
        return (activations, sums), None

    (_, sums), _ = lax.scan(tick, (run.buffer(table.num_activation_slots), no_sums), _my_rows(table))
    return collectives.all_reduce(sums, "pp")


def value_and_gradient(
    program: Program, ends: dict, layers: PyTree, micro_batches: PyTree, schedule: Schedule, exchange: Exchange
) -> tuple[PyTree, dict, PyTree]:
    """Returns (the head's sums, gradient of `ends`, gradient of `layers`), summed over micro-batches, accumulated in FP32.

    Sums are local over dp and cp and equal on every pp rank. Gradients are shaped as `ends` and `layers`, and summed over devices only as
    far as `exchange` sums them; the gradient of `ends` is still to be summed over pp.
    """
    run = _Execution(program, ends, layers, micro_batches, exchange, keep_residuals=True)

    def first(m):
        return program.embed(run.fetch(program.embed_keys), run.micro_batch(m))

    def accumulate(totals, gradients):
        add = lambda total, gradient: total + gradient.astype(total.dtype)
        return {**totals, **jax.tree.map(add, pick(totals, tuple(gradients)), exchange.finish_ends(gradients))}

    def head(m, carry):
        """Turns the last activation into its cotangent: the loss, its gradient and that of the head's weights are found together."""
        x_BTD, d_ends, sums = carry
        both = jax.value_and_grad(program.head, argnums=(0, 1), has_aux=True)
        (_, more), (dw, dx_BTD) = both(run.fetch(program.head_keys), x_BTD, run.micro_batch(m))
        return dx_BTD, accumulate(d_ends, dw), jax.tree.map(jnp.add, sums, more)

    def embed_backward(m, dx_BTD, d_ends):
        _, vjp = jax.vjp(lambda w: program.embed(w, run.micro_batch(m)), run.fetch(program.embed_keys))
        return accumulate(d_ends, vjp(dx_BTD)[0])

    sums_shape = jax.eval_shape(lambda: program.head(run.fetch(program.head_keys), run.x_BTD, run.micro_batch(0))[1])
    no_sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums_shape)
    d_ends, d_layers = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), (ends, layers))

    if schedule.num_ranks == 1:
        num_layers = program.layers_per_stage[0]
        if schedule.num_micro_batches == 1 and all(len(leaf) == num_layers for leaf in jax.tree.leaves(layers)):
            run.layers = dataclasses.replace(run.layers, adds=False)
            d_layers = jax.tree.map(lambda w: lax.empty(w.shape, jnp.float32), layers)

        def whole(m, carry):
            store, d_ends, d_layers, sums = carry
            y_BTD, store = run.layers.forward(store, 0, first(m), run.micro_batch(m), 0, num_layers)
            dy_BTD, d_ends, sums = head(m, (y_BTD, d_ends, sums))
            dx_BTD, d_layers = run.layers.backward(store, 0, dy_BTD, run.micro_batch(m), 0, 0, num_layers, d_layers)
            return store, embed_backward(m, dx_BTD, d_ends), d_layers, sums

        carry = (run.layers.empty_store(1, program.layer_slots()), d_ends, d_layers, no_sums)
        _, d_ends, d_layers, sums = lax.fori_loop(0, schedule.num_micro_batches, whole, carry)
        return sums, d_ends, d_layers

    table = lower(schedule, program.layers_per_stage)

    def tick(carry, row):
        activations, cotangents, store, kept, result_BTD, d_ends, d_layers, sums = carry
        do = dict(zip(COLUMNS, row))
        m, at, residual = do["micro_batch"], do["layer_slot"], do["residual"]
        micro_batch = run.micro_batch(m)
        if schedule.latency == 2:
            arriving = exchange_with_neighbours(result_BTD)

        scope = jax.named_scope  # as profiles show them
        with scope("embed"):
            x_BTD = when(do["embed"], lambda _: first(m), activations[do["activation"]])
        with scope("forward"):
            y_BTD, store = run.layers.forward(store, residual, x_BTD, micro_batch, at, do["forward_count"])
        with scope("head"):
            dy_BTD, d_ends, sums = when(do["head"], lambda carry: head(m, carry), (cotangents[do["cotangent"]], d_ends, sums))
        split = (store, residual, kept, do["kept"])
        if table.splits_backward:
            with scope("backward_weight"):
                span = (micro_batch, at, do["weight_first"], do["weight_count"])
                d_layers = run.layers.backward_weight(*split, run.x_BTD, *span, d_layers)
        with scope("backward"):
            dy_BTD, d_layers = run.layers.backward(store, residual, dy_BTD, micro_batch, at, do["full_first"], do["full_count"], d_layers)
        if table.splits_backward:
            with scope("backward_input"):
                dy_BTD, kept = run.layers.backward_input(*split, dy_BTD, micro_batch, at, do["input_first"], do["input_count"])
        with scope("embed_backward"):
            d_ends = when(do["embed_backward"], lambda d_ends: embed_backward(m, dy_BTD, d_ends), d_ends)

        result_BTD = jnp.where(do["forward"] == 1, y_BTD, dy_BTD)
        cotangents = _receive(cotangents, do["result"], result_BTD)
        if schedule.latency == 1:
            arriving = exchange_with_neighbours(result_BTD)
        activations = _receive(activations, do["arriving_activation"], arriving[0])
        cotangents = _receive(cotangents, do["arriving_cotangent"], arriving[1])
        return (activations, cotangents, store, kept, result_BTD, d_ends, d_layers, sums), None

    start = (
        run.buffer(table.num_activation_slots),
        run.buffer(table.num_cotangent_slots),
        run.layers.empty_store(table.num_residual_slots, program.layer_slots()),
        run.layers.empty_kept(table.num_kept_slots, table.most_kept_layers, run.x_BTD, jax.eval_shape(run.micro_batch, 0)),
        run.x_BTD, d_ends, d_layers, no_sums,
    )  # fmt: skip
    (*_, d_ends, d_layers, sums), _ = lax.scan(tick, start, _my_rows(table))
    return collectives.all_reduce(sums, "pp"), d_ends, d_layers


def exchange_with_neighbours(result_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sends the result both ways, and returns what came from the rank before, an activation if it ran a forward, and from the next rank, a
    cotangent if it ran a backward."""
    return collectives.shift(result_BTD, "pp", 1), collectives.shift(result_BTD, "pp", -1)


def when(condition: jax.Array, body, carry):
    """Returns `body(carry)` if `condition` is 1, else `carry`: a loop of one round or none, whose carry XLA updates in place. What passes through a
    conditional untouched is copied, which would double the residual store."""
    return lax.fori_loop(0, condition, lambda _, carry: body(carry), carry)


class _Execution:
    """What both executors need of one call: the rank's layers, the micro-batches, the shape of an activation."""

    def __init__(self, program: Program, ends, layers, micro_batches, exchange: Exchange, keep_residuals: bool):
        self.ends, self.exchange, self.micro_batches = ends, exchange, micro_batches
        x = jax.eval_shape(lambda: program.embed(self.fetch(program.embed_keys), self.micro_batch(0)))
        self.x_BTD = jnp.zeros(x.shape, x.dtype)
        one_layer = jax.eval_shape(lambda: exchange.fetch_layer(jax.tree.map(lambda w: w[0], layers)))
        micro_batch = jax.eval_shape(lambda: self.micro_batch(0))
        vjp = LayerVjp.trace(program.layer, one_layer, x, micro_batch) if keep_residuals else LayerVjp(program.layer, None, (), ())
        self.layers = Layers(vjp, layers, exchange.fetch_layer, exchange.finish_layer, exchange.ahead)

    def fetch(self, keys: tuple[str, ...]) -> dict:
        return self.exchange.fetch_ends(pick(self.ends, keys))

    def micro_batch(self, m):
        return jax.tree.map(lambda a: a[m], self.micro_batches)

    def buffer(self, num_slots: int):
        return jnp.zeros((max(num_slots, 1), *self.x_BTD.shape), self.x_BTD.dtype)


def _my_rows(table: Table):
    return jnp.asarray(table.rows)[:, lax.axis_index("pp")]


def _receive(buffer, slot, value):
    """Returns `buffer` with `value` in `slot`, or as it is where slot is -1."""
    at = jnp.maximum(slot, 0)
    return lax.dynamic_update_index_in_dim(buffer, jnp.where(slot >= 0, value, buffer[at]), at, 0)


def pick(ends: dict, keys: tuple[str, ...]) -> dict:
    return {key: ends[key] for key in keys}
