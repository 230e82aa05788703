"""The recipe: schedule, decay mask and clipping by hand, AdamW against one written out, the norm of a sharded gradient."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from herd_jax.errors import UserError
from herd_jax.mesh import FSDP_AXES, MeshConfig, make_mesh
from herd_jax.models.config import MODELS
from herd_jax.models.llama import Llama
from herd_jax.models.params import Declaration, normal
from herd_jax.training.optimizer import OptimizerConfig, clip, global_norm, learning_rate, make_optimizer

CONFIG = OptimizerConfig(peak_learning_rate=8e-4, final_learning_rate=2e-4, warmup_steps=10, decay_steps=30)


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.0),
        (1, 0.8e-4),
        (5, 4e-4),
        (10, 8e-4),
        (15, 2e-4 + 6e-4 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way down: cos 45 degrees
        (20, 5e-4),  # half way: between peak and floor
        (25, 2e-4 + 6e-4 * (1 - math.sqrt(0.5)) / 2),
        (30, 2e-4),
        (1000, 2e-4),
    ],
)
def test_schedule_by_hand(step, expected):
    assert float(learning_rate(CONFIG)(step)) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_schedule_without_warmup_or_decay():
    rate = learning_rate(OptimizerConfig(peak_learning_rate=1.0, final_learning_rate=0.5, warmup_steps=0, decay_steps=2))
    assert [float(rate(step)) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
    rate = learning_rate(OptimizerConfig(peak_learning_rate=1.0, final_learning_rate=0.5, warmup_steps=2, decay_steps=2))
    assert [float(rate(step)) for step in range(5)] == pytest.approx([0, 0.5, 1.0, 0.5, 0.5])
    rate = learning_rate(OptimizerConfig(peak_learning_rate=1.0, final_learning_rate=0.5, warmup_steps=0, decay_steps=0))
    assert float(rate(1)) == 0.5 and math.isfinite(float(rate(0)))


def test_the_papers_schedule():
    """405B: 8e-5 after 8,000 steps, 8e-7 after 1,200,000 (section 3.4.1); steps in the millions keep their precision."""
    rate = learning_rate(OptimizerConfig(8e-5, 8e-7, warmup_steps=8000, decay_steps=1_200_000))
    assert float(rate(1)) == pytest.approx(1e-8)
    assert float(rate(8000)) == pytest.approx(8e-5)
    assert float(rate(604_000)) == pytest.approx((8e-5 + 8e-7) / 2)
    assert float(rate(1_200_000)) == pytest.approx(8e-7)


@pytest.mark.parametrize("start, expected", [(20, 5e-4), (10, 8e-4), (1000, 2e-4)])
def test_annealing_by_hand(start, expected):
    """From what the schedule has at `start`, linear to 0; before it, the schedule."""
    plain, annealed = (learning_rate(dataclasses.replace(CONFIG, anneal_from=start, anneal_steps=steps)) for steps in (0, 8))
    assert all(float(annealed(step)) == float(plain(step)) for step in range(start + 1))
    rates = [float(annealed(start + step)) for step in range(10)]
    assert rates == pytest.approx([expected * max(0, 8 - step) / 8 for step in range(10)], rel=1e-5) and rates[8] == rates[9] == 0


def test_annealing_from_the_first_step():
    rate = learning_rate(OptimizerConfig(peak_learning_rate=1.0, warmup_steps=0, anneal_steps=4))
    assert [float(rate(step)) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0, 0]


def numpy_adamw(params, gradients, config, decays):
    """AdamW of Loshchilov and Hutter in FP64, one gradient a step; step t = 1, 2, ... has the schedule's rate at t."""
    params = {name: p.astype(np.float64) for name, p in params.items()}
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, start=1):
        rate = float(learning_rate(config)(t))
        for name, g in gradient.items():
            m[name] = config.b1 * m[name] + (1 - config.b1) * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
            update = (m[name] / (1 - config.b1**t)) / (np.sqrt(v[name] / (1 - config.b2**t)) + config.eps)
            params[name] -= rate * (update + config.weight_decay * decays[name] * params[name])
    return params


def test_adamw_against_numpy():
    rng = np.random.default_rng(0)
    declared = {"matrix": Declaration((3, 4), (None, None), normal(1.0)), "norm": Declaration((4,), (None,), normal(1.0))}
    params = {name: rng.normal(size=d.shape).astype(np.float32) for name, d in declared.items()}
    gradients = [{name: rng.normal(size=d.shape).astype(np.float32) for name, d in declared.items()} for _ in range(40)]
    config = OptimizerConfig(0.1, 0.01, warmup_steps=5, decay_steps=30, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-3)
    optimizer = make_optimizer(config, declared)

    @jax.jit
    def step(params, state, gradient, number):
        updates, state = optimizer.update(gradient, state, params, learning_rate=learning_rate(config)(number))
        return jax.tree.map(jnp.add, params, updates), state

    got, state = params, optimizer.init(params)
    for number, gradient in enumerate(gradients, start=1):
        got, state = step(got, state, gradient, number)
    expected = numpy_adamw(params, gradients, config, {"matrix": 1, "norm": 0})
    for name in declared:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)
        assert np.abs(got[name] - params[name]).max() > 0.1


def test_decay_mask_by_hand():
    """With a gradient of 0, matrices shrink by rate x decay in the first step and norms stay, stacked by layer or not."""
    declared = Llama.make(tiny.CONFIG).declared
    params = jax.tree.map(lambda d: jnp.ones(d.canonical_shape), declared, is_leaf=lambda node: isinstance(node, Declaration))
    optimizer = make_optimizer(OptimizerConfig(peak_learning_rate=0.01, warmup_steps=0, weight_decay=0.5), declared)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, learning_rate=0.01)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    shrunk = {name(path): float(update.ravel()[0]) for path, update in jax.tree.leaves_with_path(updates)}
    matrices = {"ends.embed.table", "ends.head.output", "layers.qkv", "layers.out", "layers.gate_up", "layers.down"}
    norms = {"ends.head.norm", "layers.attention_norm", "layers.ffn_norm"}
    assert set(shrunk) == matrices | norms
    assert all(shrunk[name] == pytest.approx(-0.005, rel=1e-3) for name in matrices)
    assert all(shrunk[name] == 0 for name in norms)


def test_released_models_decay_all_but_norms():
    for name in ("llama3-405b", "llama3.2-1b"):
        config = MODELS[name]
        declared = jax.tree.leaves(Llama.make(config).declared, is_leaf=lambda node: isinstance(node, Declaration))
        assert sum(d.size for d in declared if not d.decays) == (2 * config.num_layers + 1) * config.dim


def test_clipping():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    norm = jnp.float32(5.0)
    clipped = clip(gradients, norm, 1.0)
    np.testing.assert_allclose(clipped["a"], [0.6, 0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [[0.8]], rtol=1e-6)
    for unchanged in (5.0, 7.0, math.inf):
        chex.assert_trees_all_equal(clip(gradients, norm, unchanged), gradients)
    nothing = jax.tree.map(jnp.zeros_like, gradients)
    chex.assert_trees_all_equal(clip(nothing, jnp.float32(0), 1.0), nothing)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 1, 4)], ids=str)
def test_global_norm_counts_each_value_once(sizes):
    """Leaves replicated, and sharded over one axis, several, or all: the norm is that of the whole, on every device."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    specs = {"norm": P(None), "tp": P(None, "tp"), "fsdp": P(FSDP_AXES, None), "pp": P("pp", None)}
    specs["all"] = P("pp", FSDP_AXES, "tp")
    shapes = {"norm": (5,), "tp": (3, 4), "fsdp": (8, 3), "pp": (2, 5), "all": (2, 8, 4)}
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    expected = np.sqrt(sum((v.astype(np.float64) ** 2).sum() for v in values.values()))
    placed = {name: jax.device_put(v, NamedSharding(mesh, specs[name])) for name, v in values.items()}
    norm = jax.shard_map(lambda g: global_norm(g, specs, mesh), mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False)
    for shard in jax.jit(norm)(placed).addressable_shards:
        assert float(shard.data) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"b1": 1.0}, "optimizer.b1 is 1.0"),
        ({"b2": -0.1}, "optimizer.b2 is -0.1"),
        ({"peak_learning_rate": -1.0}, "optimizer.peak_learning_rate is -1.0"),
        ({"final_learning_rate": math.nan}, "optimizer.final_learning_rate is nan"),
        ({"weight_decay": math.inf}, "optimizer.weight_decay is inf"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm is 0.0"),
        ({"clip_norm": math.nan}, "optimizer.clip_norm is nan"),
        ({"warmup_steps": 20, "decay_steps": 10}, "optimizer.warmup_steps 20 must lie between 0 and optimizer.decay_steps 10"),
        ({"anneal_steps": -1}, "optimizer.anneal_steps is -1"),
        ({"anneal_steps": 5, "anneal_from": 99}, "optimizer.anneal_from 99 lies before the end of optimizer.warmup_steps 100"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps -1"),
    ],
)
def test_values_that_are_refused(fields, word):
    with pytest.raises(UserError, match=word):
        OptimizerConfig(**fields)
