"""The paper's recipes: their numbers, and their steps traced at full size on an abstract mesh of thousands of devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from herd_jax.config import read_command_line, to_dict
from herd_jax.mesh import AXES
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.training.config import RunConfig, check_batches
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.optimizer import learning_rate, make_optimizer
from herd_jax.training.resume import changes
from herd_jax.training.stages.stages import devices_of, stage_configs
from herd_jax.training.state import State, StatePlan
from herd_jax.training.step import Steps

CONFIGS = Path(__file__).parents[2] / "configs"


def read(size: str) -> tuple[RunConfig, AbstractMesh]:
    config = read_command_line(RunConfig, ["--config", str(CONFIGS / f"llama3_{size}.py")])
    return config, abstract_mesh(config)


def abstract_mesh(config: RunConfig) -> AbstractMesh:
    return AbstractMesh(tuple(getattr(config.mesh, axis) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize("size, peak, devices", [("405b", 8e-5, 8192), ("70b", 1.5e-4, 2048), ("8b", 3e-4, 256)])
def test_numbers_of_the_paper(size, peak, devices):
    config, mesh = read(size)
    ramp, rate = config.train.ramp, learning_rate(config.optimizer)
    assert mesh.size == devices
    assert [phase.tokens_per_step for phase in ramp.phases] == [4 * 2**20, 8 * 2**20, 16 * 2**20]
    assert [phase.seq_len for phase in ramp.phases] == [4096, 8192, 8192]
    assert [phase.from_tokens for phase in ramp.phases] == [0, 252_000_000, 2_870_000_000_000]
    assert ramp.tokens_before(config.train.num_steps - 1) < 15.6e12 <= ramp.tokens_before(config.train.num_steps)
    assert float(rate(8000)) == pytest.approx(peak) and float(rate(4000)) == pytest.approx(peak / 2)
    assert float(rate(1_200_000)) == pytest.approx(peak / 100)
    assert sum(config.data.sources.values()) == pytest.approx(1)


def test_annealing_continues_the_run():
    """40M tokens are 3 steps; the mixture changes with the first of them; a checkpoint of the run itself goes on."""
    (run, _), (annealed, _) = read("405b"), read("405b_anneal")
    start = run.train.num_steps
    rates = [float(learning_rate(annealed.optimizer)(step)) for step in range(start, start + 4)]
    assert rates == pytest.approx([float(learning_rate(run.optimizer)(start)) * left / 3 for left in (3, 2, 1, 0)], rel=1e-4)
    assert annealed.train.num_steps == start + 3 and annealed.checkpoint.keep == 3 and annealed.checkpoint.every_steps == 1
    tokens = run.train.ramp.tokens_before(start)
    assert [phase.from_tokens for phase in annealed.data.phases] == [tokens]
    assert sum(annealed.data.phases[0].sources.values()) == pytest.approx(1)
    assert not changes({"config": to_dict(run), "position": {"tokens": tokens}}, annealed, {})


def test_six_stages_to_128k():
    """From row 2 of Table 4 to row 3; 800B tokens in steps of about 16M, the last of 15.6T; the rate goes on falling as before."""
    config, _ = read("405b_long_context")
    first, *stages = stage_configs(config)
    assert len(stages) == 6 and devices_of(config).cp == 1
    assert (first.mesh.cp, first.mesh.dp, first.train.seq_len) == (1, 128, 8192)
    last = stages[-1]
    assert (last.mesh.tp, last.mesh.cp, last.mesh.pp, last.mesh.dp) == (8, 16, 16, 8)
    assert (last.train.seq_len, last.train.global_batch_size, last.train.num_micro_batches) == (131_072, 128, 16)
    lengths, cps = ([get(stage) for stage in stages] for get in (lambda s: s.train.seq_len, lambda s: s.mesh.cp))
    assert lengths == sorted(set(lengths)) and lengths[0] > 8192 and cps == sorted(cps)
    totals = [stage.train.ramp.tokens_before(stage.train.num_steps) for stage in (first, *stages)]
    assert sum(totals[1:]) == pytest.approx(800e9, rel=1e-3) and sum(totals) == pytest.approx(15.6e12, rel=1e-4)
    ends = [(float(learning_rate(s.optimizer)(0)), float(learning_rate(s.optimizer)(s.train.num_steps))) for s in (first, *stages)]
    assert all(end == pytest.approx(begin, rel=1e-4) for (_, end), (begin, _) in zip(ends, ends[1:]))
    assert first.model.resolve().rope_scaling.factor == 1 and last.model.resolve().rope_scaling.factor == 8


@pytest.mark.parametrize("number", [1, 3, 6])
def test_long_stages_trace_at_full_size(number):
    stage = stage_configs(read("405b_long_context")[0])[number]
    trace(stage, abstract_mesh(stage))


@pytest.mark.parametrize("size", ["405b", "70b", "8b"])
def test_step_traces_at_full_size(size):
    trace(*read(size))


def trace(config: RunConfig, mesh: AbstractMesh) -> None:
    model_config = config.model.resolve()
    model_config.check_mesh(mesh)
    check_batches(config.train.ramp, mesh)
    model = Llama.make(model_config, "blockwise", config.train.remat)
    layout = Layout.make(mesh, model_config.num_layers, config.pipeline.num_chunks)
    plan = StatePlan(model.declared, make_optimizer(config.optimizer, model.declared), layout)
    steps = Steps(NEXT_TOKEN, model, layout, plan, config.optimizer, jnp.bfloat16, config.train.gather, config.pipeline)
    phase = config.train.ramp.phases[-1]
    shape = (phase.num_micro_batches, phase.global_batch_size // phase.num_micro_batches, phase.seq_len)
    batch = {field: jax.ShapeDtypeStruct(shape, bool if field == "loss_mask" else np.int32) for field in NEXT_TOKEN.fields}
    params = jax.tree.map(lambda d: jax.ShapeDtypeStruct(layout.stored_shape(d), jnp.float32), model.declared, is_leaf=lambda n: hasattr(n, "axes"))
    state = State(jax.ShapeDtypeStruct((), np.int32), params, jax.eval_shape(plan.optimizer.init, params))
    after, metrics = jax.eval_shape(steps.train, state, batch)
    assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(lambda a: a.shape, state)
    assert metrics["loss"].shape == ()
