"""The paper's recipes: their numbers, and their steps traced at full size on an abstract mesh of thousands of devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from herd_jax.config import read_command_line
from herd_jax.mesh import AXES
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.training.optimizer import learning_rate, make_optimizer
from herd_jax.training.run import RunConfig, check_batches
from herd_jax.training.state import State, StatePlan
from herd_jax.training.step import BATCH_FIELDS, Steps

CONFIGS = Path(__file__).parents[1] / "configs"


def read(size: str) -> tuple[RunConfig, AbstractMesh]:
    config = read_command_line(RunConfig, ["--config", str(CONFIGS / f"llama3_{size}.py")])
    return config, AbstractMesh(tuple(getattr(config.mesh, axis) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 4)


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


@pytest.mark.parametrize("size", ["405b", "70b", "8b"])
def test_step_traces_at_full_size(size):
    config, mesh = read(size)
    model_config = config.model.resolve()
    model_config.check_mesh(mesh)
    check_batches(config.train.ramp, mesh)
    model = Llama.make(model_config, "blockwise", config.train.remat)
    layout = Layout.make(mesh, model_config.num_layers, config.pipeline.num_chunks)
    plan = StatePlan(model.declared, make_optimizer(config.optimizer, model.declared), layout)
    steps = Steps(model, layout, plan, config.optimizer, jnp.bfloat16, config.train.gather, config.pipeline)
    phase = config.train.ramp.phases[-1]
    shape = (phase.num_micro_batches, phase.global_batch_size // phase.num_micro_batches, phase.seq_len)
    batch = {field: jax.ShapeDtypeStruct(shape, bool if field == "loss_mask" else np.int32) for field in BATCH_FIELDS}
    params = jax.tree.map(lambda d: jax.ShapeDtypeStruct(layout.stored_shape(d), jnp.float32), model.declared, is_leaf=lambda n: hasattr(n, "axes"))
    state = State(jax.ShapeDtypeStruct((), np.int32), params, jax.eval_shape(plan.optimizer.init, params))
    after, metrics = jax.eval_shape(steps.train, state, batch)
    assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(lambda a: a.shape, state)
    assert metrics["loss"].shape == ()
