"""Memory of one device during a training step, by kind, before anything is compiled.

What waits from one operation to another (weights, optimizer state, gradients, residuals, messages) is counted from the declarations, the
schedule's slots and the traced layer, as the step itself lays it out. What an operation needs while it runs is estimated from the same trace: the
largest sum of values alive at once, where element-wise operations are taken to be fused with what follows.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from herd_jax.mesh import AXES, FSDP_AXES
from herd_jax.models.llama import Llama
from herd_jax.models.log_probabilities import CHUNK_TOKENS
from herd_jax.models.params import Layout, is_declaration, stacked
from herd_jax.parallel.split_backward import is_dear
from herd_jax.parallel.stage import LayerVjp
from herd_jax.planning.job import Job

FP32 = 4


def estimate(job: Job) -> dict[str, float]:
    """Returns the bytes of the fullest device by kind, and their "total", at the moment of the step that needs most.

    parameters and optimizer: FP32 shards; gathered_weights: in the compute dtype; gradients: FP32 sums over micro-batches; activations: residuals
    and kept cotangents of the micro-batches in flight; logits: what the head computes with, a chunk at a time, and its gradients; buffers: messages,
    the batch, and what a layer needs beyond the logits' memory, which both use in turn (with one micro-batch, the layers' gradients use it too: they
    are first written behind the head); update: the sharded sums of the gradients, where they are reduced once a step (AdamW itself works in place).
    """
    dtype = "float32" if job.hardware.value_bytes == FP32 else "bfloat16"
    itemsize = jnp.dtype(dtype).itemsize
    layout = Layout.make(job.mesh, job.model.num_layers, job.pipeline.num_chunks)
    declared = Llama.make(job.model).declared
    size = lambda tree, gathered: sum(_share(layout, d, gathered) for d in jax.tree.leaves(tree, is_leaf=is_declaration))
    sharded, whole, ends = size(declared, False), size(declared, True), size(declared["ends"], True)
    one_layer = size(declared["layers"], True) / len(layout.slots(declared["layers"]["qkv"])) * job.pp
    operation = _operation(job.model, job.tp, job.cp, job.seq_len // job.cp, job.micro_batch_size, dtype, job.remat)

    table = job.table
    slots = max(1, *job.layers_per_stage)
    messages = max(table.num_activation_slots, 1) + max(table.num_cotangent_slots, 1) + 3 if job.pp > 1 else 2
    copies = itemsize < FP32 or job.dp * job.cp > 1  # else the stored weights are computed with as they are
    tokens = job.micro_batch_size * job.seq_len // job.cp
    columns = math.ceil(job.model.vocab_size / job.tp)
    # XLA's CPU backend keeps the exponentials beside the logits, and the chunk's gradient beside that of the chunks so far.
    on_cpu = itemsize == FP32
    gradients_of_head = 2 if on_cpu and tokens > CHUNK_TOKENS else 1
    logits = min(tokens, CHUNK_TOKENS) * columns * ((1 + on_cpu) * FP32 + itemsize) + gradients_of_head * FP32 * job.model.dim * columns
    logits += 2 * FP32 * tokens * job.model.dim  # the hidden states, whole over tp, and their gradient
    ahead = job.gather == "layer" and job.dp * job.cp > 1 and job.pp == 1  # the next layer's weights, the gradient of the one before
    gradients = FP32 * (whole if job.gather == "step" else sharded + one_layer)
    in_a_layer = operation.temporaries + 2 * itemsize * one_layer * ahead
    if job.pp == 1 and job.num_micro_batches == 1:
        of_layers = gradients - FP32 * (ends if job.gather == "step" else size(declared["ends"], False))
        gradients, in_a_layer = gradients - of_layers, in_a_layer + of_layers
    memory = {
        "parameters": FP32 * sharded,
        "optimizer": 2 * FP32 * sharded,
        "gathered_weights": itemsize * (whole if job.gather == "step" else one_layer + ends) * copies,
        "gradients": gradients,
        "activations": max(2, slots * max(table.num_residual_slots, 1)) * operation.residuals
        + max(2, table.most_kept_layers * table.num_kept_slots) * (table.splits_backward and job.pp > 1) * operation.kept,
        "logits": logits,
        "buffers": messages * operation.activation + job.num_micro_batches * operation.batch + max(0, in_a_layer - logits),
        "update": FP32 * sharded * (job.gather == "step" and job.dp * job.cp > 1),
    }
    return memory | {"total": sum(memory.values())}


def _share(layout: Layout, declaration, gathered: bool) -> int:
    """Returns how many values of a parameter one device holds; `gathered`: with FSDP's shards put together."""
    spec, sizes = layout.spec(declaration), layout.mesh.shape
    axes = [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]
    return math.prod(layout.stored_shape(declaration)) // math.prod(sizes[axis] for axis in axes if not (gathered and axis in FSDP_AXES))


@dataclasses.dataclass(frozen=True)
class _Operation:
    """Bytes of one layer and one micro-batch on one device."""

    residuals: int
    kept: int
    activation: int  # between layers
    temporaries: int  # of the operation that needs most
    batch: int  # tokens, masks, rotations


@functools.cache
def _operation(model, tp: int, cp: int, num_tokens: int, micro_batch_size: int, dtype: str, remat: str) -> _Operation:
    mesh = AbstractMesh((tp, cp, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    llama = Llama.make(model, "blockwise", remat)
    layout, found = Layout.make(mesh, 1), {}
    one_layer = stacked(llama.declared["layers"], ())
    weights = jax.tree.map(lambda d: jax.ShapeDtypeStruct(layout.stored_shape(d), dtype), one_layer, is_leaf=is_declaration)
    specs = jax.tree.map(lambda d: PartitionSpec(*("tp" if axis == "tp" else None for axis in layout.spec(d))), one_layer, is_leaf=is_declaration)

    def probe(weights, tokens):
        fields = {"tokens": tokens, "targets": tokens, "loss_mask": tokens > 0, "segment_ids": tokens, "positions": tokens}
        batch = llama.micro_batches(fields)
        micro_batch = jax.tree.map(lambda a: a[0], batch)
        program = llama.program((1,), None)
        x_BTD = jnp.zeros((micro_batch_size, num_tokens // tp, model.dim), dtype)
        vjp = LayerVjp.trace(program.layer, weights, x_BTD, micro_batch)
        residuals = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in vjp.stored]
        known = (weights, residuals, micro_batch)
        split = vjp.split(*known, x_BTD)
        forward = jax.make_jaxpr(lambda w, x: vjp.forward(w, x, micro_batch))(weights, x_BTD)
        backward = jax.make_jaxpr(lambda known, dy: vjp.backward(*known, dy))(known, x_BTD)
        found.update(vjp=vjp, split=split, batch=batch, x=x_BTD, temporaries=max(_peak(forward.jaxpr), _peak(backward.jaxpr)))
        return tokens

    tokens = jax.ShapeDtypeStruct((1, micro_batch_size, num_tokens * cp), jnp.int32)
    spec = PartitionSpec(None, None, "cp")
    jax.eval_shape(jax.shard_map(probe, mesh=mesh, in_specs=(specs, spec), out_specs=spec, check_vma=False), weights, tokens)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return _Operation(size(found["vjp"].stored), size(found["split"].kept_shapes), size(found["x"]), found["temporaries"], size(found["batch"]))


def _peak(jaxpr: core.Jaxpr) -> int:
    """Returns the most bytes of values alive at once, without the inputs. Only what a dear operation reads or makes counts as stored."""
    eqns = jaxpr.eqns
    stored = {var for eqn in eqns if is_dear(eqn) for var in (*eqn.invars, *eqn.outvars) if isinstance(var, core.Var)}
    stored -= {*jaxpr.invars, *jaxpr.constvars}
    last_use = {}
    for index in reversed(range(len(eqns))):
        until = max((last_use.get(var, index) for var in eqns[index].outvars if var not in stored), default=index)
        for var in eqns[index].invars:
            if isinstance(var, core.Var):
                last_use[var] = max(last_use.get(var, index), until)
    for var in jaxpr.outvars:
        if isinstance(var, core.Var):
            last_use[var] = len(eqns)
    alive, peak = {}, 0
    for index, eqn in enumerate(eqns):
        alive |= {var: var.aval.size * var.aval.dtype.itemsize for var in eqn.outvars if var in stored}
        inner = max((_peak(body) for body in core.jaxprs_in_params(eqn.params)), default=0)
        peak = max(peak, sum(alive.values()) + inner)
        alive = {var: bytes for var, bytes in alive.items() if last_use.get(var, index) > index}
    return peak
