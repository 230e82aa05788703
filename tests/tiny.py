"""A tiny model on any mesh, random packed batches for it, and a plain forward to differentiate: the oracle of the parallel steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.models.config import LlamaConfig
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.models.rope import RopeScaling, frequencies
from herd_jax.parallel.context import zigzag_order
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.optimizer import OptimizerConfig, make_optimizer
from herd_jax.training.state import State, StatePlan
from herd_jax.training.step import Steps

# 61 words: padded on every tp; 5 layers: empty slots on every pp; 8 kv heads: tp up to 8.
CONFIG = LlamaConfig(32, 5, 16, 8, 4, 48, vocab_size=61, rope_theta=1e4, rope_scaling=RopeScaling(original_max_position=64), init_std=0.2)
NUM_ROWS, SEQ_LEN = 16, 32
_made: dict[tuple, Steps] = {}


def make_steps(tp=1, cp=1, pp=1, dp=1, config=CONFIG, attention="dense", remat="none", dtype=jnp.float32, gather="step",
               pipeline=PipelineConfig(), task=NEXT_TOKEN, **optimizer) -> Steps:
    """Returns the steps of a layout, the same object for the same one, so that what one test compiled serves the others."""
    key = (tp, cp, pp, dp, config, attention, remat, dtype, gather, pipeline, id(task), *sorted(optimizer.items()))
    if key not in _made:
        _made[key] = _make_steps(tp, cp, pp, dp, config, attention, remat, dtype, gather, pipeline, task, optimizer)
    return _made[key]


def _make_steps(tp, cp, pp, dp, config, attention, remat, dtype, gather, pipeline, task, optimizer) -> Steps:
    mesh = make_mesh(MeshConfig(tp, cp, pp, dp), jax.devices()[: tp * cp * pp * dp])
    model, layout = Llama.make(config, attention, remat), Layout.make(mesh, config.num_layers, pipeline.num_chunks)
    optimizer = OptimizerConfig(**{"warmup_steps": 0, "peak_learning_rate": 1e-2, **optimizer})
    plan = StatePlan(model.declared, make_optimizer(optimizer, model.declared), layout)
    return Steps(task, model, layout, plan, optimizer, dtype, gather, pipeline)


def make_rows(seed=0, num_rows=NUM_ROWS, seq_len=SEQ_LEN, vocab_size=CONFIG.vocab_size, max_documents=3) -> dict[str, np.ndarray]:
    """Packed documents of random lengths with unequal numbers of targets a row: fields [num_rows, seq_len], in row order."""
    rng = np.random.default_rng(seed)
    begins = np.zeros((num_rows, seq_len), bool)
    for row in begins:
        row[rng.choice(seq_len, rng.integers(0, max_documents), replace=False)] = True
    index = np.arange(seq_len)
    tokens = rng.integers(0, vocab_size, (num_rows, seq_len + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": rng.random((num_rows, seq_len)) < rng.random((num_rows, 1)),
        "segment_ids": 1 + np.cumsum(begins, 1, dtype=np.int32),
        "positions": (index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)).astype(np.int32),
    }


def to_batch(steps: Steps, rows: dict[str, np.ndarray], num_micro_batches: int) -> dict[str, jax.Array]:
    """Rows as a batch on the mesh of `steps`."""
    seq_len = rows["tokens"].shape[1]
    order = zigzag_order(seq_len, steps.layout.mesh.shape["cp"])
    in_order = lambda array: array[:, order] if array.ndim > 1 else array
    cut = {field: in_order(array).reshape(num_micro_batches, -1, *array.shape[1:]) for field, array in rows.items()}
    return {field: jax.device_put(array, NamedSharding(steps.layout.mesh, steps.task.fields[field])) for field, array in cut.items()}


def loss_and_gradient(steps: Steps, rows, num_micro_batches: int, seed: int = 0):
    """(mean loss, canonical gradient as numpy) from the initial parameters of `seed`."""
    state = steps.plan.init(seed)
    loss, gradient = steps.gradient(state.params, to_batch(steps, rows, num_micro_batches))
    canonical = steps.plan.to_canonical(State(state.step, gradient, state.optimizer)).params
    return float(loss), jax.tree.map(np.asarray, canonical)


def one_device_row_by_row(rows, config: LlamaConfig = CONFIG):
    """Does what `loss_and_gradient` of one device does, for any number of rows with one program: each row on its own, weighted by its targets."""
    steps = make_steps(config=config)
    state, counts = steps.plan.init(0), rows["loss_mask"].sum(axis=1)
    total, gradients = 0.0, jax.tree.map(lambda leaf: np.zeros(leaf.shape), state.params)
    for row, count in enumerate(counts):
        alone = {field: array[row : row + 1] for field, array in rows.items()}
        loss, gradient = steps.gradient(state.params, to_batch(steps, alone, 1))
        total += float(loss) * count
        gradients = jax.tree.map(lambda so_far, of_row: so_far + np.asarray(of_row) * count, gradients, gradient)
    mean = jax.tree.map(lambda leaf: jnp.float32(leaf / counts.sum()), gradients)
    return total / counts.sum(), jax.tree.map(np.asarray, steps.plan.to_canonical(State(state.step, mean, state.optimizer)).params)


def canonical_params(steps: Steps, seed: int = 0):
    return jax.tree.map(np.asarray, steps.plan.to_canonical(steps.plan.init(seed)).params)


def plain_feed_forward(x, w, layer) -> jax.Array:
    gate, up = jnp.moveaxis(jnp.einsum("btd,dcf->btcf", x, w["gate_up"]), 2, 0)
    return (jax.nn.silu(gate) * up) @ w["down"]


def plain_logits(params, rows, config: LlamaConfig = CONFIG, feed_forward=plain_feed_forward) -> jax.Array:
    """Logits [rows, S, V] of canonical parameters by the formulas of the architecture: no mesh, no chunks, materialised masks."""
    c, layers = config, params["layers"]
    segment, index = rows["segment_ids"], np.arange(rows["tokens"].shape[1])
    mask = (segment[:, :, None] == segment[:, None, :]) & (index[:, None] >= index)
    if "branch_ids" in rows:
        branch = rows["branch_ids"]
        mask &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    angle = rows["positions"][..., None, None] * frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    norm = lambda x, w: x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + c.norm_eps) * w

    def turn(x):
        a, b = x[..., : c.head_dim // 2], x[..., c.head_dim // 2 :]
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)

    x = params["ends"]["embed"]["table"][rows["tokens"]]
    for i in range(c.num_layers):
        w = {name: leaf[i] for name, leaf in layers.items()}
        qkv = jnp.einsum("btd,dkgh->btkgh", norm(x, w["attention_norm"]), w["qkv"])
        group = qkv.shape[3] - 2
        q = turn(qkv[..., :group, :].reshape(*x.shape[:2], c.num_heads, c.head_dim))
        k, v = turn(qkv[..., group, :]), qkv[..., group + 1, :]
        k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
        scores = jnp.where(mask[:, None], jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(c.head_dim), -jnp.inf)
        o = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("btnh,nhd->btd", o, w["out"].reshape(c.num_heads, c.head_dim, c.dim))
        x = x + feed_forward(norm(x, w["ffn_norm"]), w, i)
    head = params["ends"]["head"]
    return norm(x, head["norm"]) @ (params["ends"]["embed"]["table"].T if c.tie_embeddings else head["output"])


def plain_loss(params, rows, config: LlamaConfig = CONFIG) -> jax.Array:
    """Mean loss of canonical parameters over the targets, from `plain_logits`."""
    logits = plain_logits(params, rows, config)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), rows["targets"][..., None], -1)[..., 0]
    return jnp.where(rows["loss_mask"], losses, 0).sum() / rows["loss_mask"].sum()


@functools.partial(jax.jit, static_argnums=2)
def plain_loss_and_gradient(params, rows, config: LlamaConfig = CONFIG):
    """Returns `plain_loss` and its gradient by autodiff, in one program."""
    return jax.value_and_grad(plain_loss)(params, rows, config)


def tied(config: LlamaConfig = CONFIG) -> LlamaConfig:
    return dataclasses.replace(config, tie_embeddings=True)


def assert_close(got, expected, tolerance=1e-5):
    """Each leaf agrees relative to the largest value of the leaf."""

    def check(path, a, b):
        scale = max(np.abs(b).max(), 1e-12)
        assert np.abs(a - b).max() <= tolerance * scale, f"{jax.tree_util.keystr(path)}: {np.abs(a - b).max() / scale:.2e}"

    jax.tree_util.tree_map_with_path(check, got, expected)
