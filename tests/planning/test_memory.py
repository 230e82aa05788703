"""Predicted memory against what XLA allocates for the compiled step."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from herd_jax.machines.hardware import HARDWARE
from herd_jax.models.config import MODELS
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.planning import memory
from herd_jax.planning.job import Job
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.state import State

# The CPU computes in FP32: its matmuls in BF16 would hold FP32 copies that no accelerator makes.
FP32_DEVICE = dataclasses.replace(HARDWARE["h100"], value_bytes=4)
MESHES = [  # (mesh, pipeline, remat, gather)
    ((1, 1, 1, 1), PipelineConfig(), "none", "step"),
    ((2, 1, 1, 2), PipelineConfig(), "attention", "step"),
    ((1, 2, 1, 2), PipelineConfig(), "none", "step"),
    ((1, 1, 4, 2), PipelineConfig(), "none", "step"),
    ((2, 1, 2, 1), PipelineConfig("interleaved", 2), "none", "layer"),
    ((1, 1, 2, 2), PipelineConfig("zero_bubble"), "none", "step"),
    ((2, 2, 2, 1), PipelineConfig("gpipe"), "layer", "step"),
]


def job(model, mesh, pipeline=PipelineConfig(), remat="none", gather="step", seq_len=512, batch_per_dp=8, hardware=FP32_DEVICE) -> Job:
    return Job(model, MODELS[model], hardware, *mesh, seq_len, batch_per_dp, 1, pipeline, remat, gather)


def allocated(job: Job) -> int:
    """Bytes of the compiled training step on each device: arguments, results that do not take their place, and temporaries."""
    steps = tiny.make_steps(
        job.tp, job.cp, job.pp, job.dp, config=job.model, attention="blockwise", remat=job.remat, gather=job.gather, pipeline=job.pipeline
    )
    shape = (job.num_micro_batches, job.micro_batch_size * job.dp, job.seq_len)
    batch = {field: jax.ShapeDtypeStruct(shape, bool if field == "loss_mask" else np.int32) for field in NEXT_TOKEN.fields}
    declaration = lambda node: hasattr(node, "axes")
    params = jax.tree.map(lambda d: jax.ShapeDtypeStruct(steps.layout.stored_shape(d), np.float32), steps.model.declared, is_leaf=declaration)
    state = State(jax.ShapeDtypeStruct((), np.int32), params, jax.eval_shape(steps.plan.optimizer.init, params))
    found = steps.train.lower(state, batch).compile().memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes


@pytest.mark.parametrize("model, seq_len", [("llama-5m", 512), pytest.param("llama-20m", 256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh, pipeline, remat, gather", [pytest.param(*case, marks=[pytest.mark.slow] * (i in (2, 3, 6))) for i, case in enumerate(MESHES)])
def test_total_is_what_is_allocated(model, seq_len, mesh, pipeline, remat, gather):
    planned = job(model, mesh, pipeline, remat, gather, seq_len)
    assert 0.92 < memory.estimate(planned)["total"] / allocated(planned) < 1.15


REAL = [  # (model, mesh, pipeline, remat, gather, seq_len)
    ("llama3.2-1b", (8, 1, 1, 1), PipelineConfig(), "none", "step", 8192),
    ("llama3-8b", (1, 1, 1, 8), PipelineConfig(), "none", "step", 2048),
    ("llama3-8b", (2, 2, 1, 2), PipelineConfig(), "attention", "step", 2048),
    ("llama3.2-1b", (1, 1, 1, 1), PipelineConfig(), "layer", "step", 2048),
    ("llama3.2-1b", (2, 2, 2, 1), PipelineConfig(), "none", "step", 2048),
    ("llama3.2-3b", (2, 1, 2, 2), PipelineConfig("zero_bubble", 2), "none", "step", 2048),
    ("llama3.2-3b", (4, 1, 1, 2), PipelineConfig(), "layer", "step", 8192),
    ("llama3-8b", (8, 1, 1, 1), PipelineConfig(), "none", "step", 2048),
    ("llama3-8b", (1, 4, 1, 2), PipelineConfig(), "layer", "layer", 2048),
    ("llama3-8b", (2, 1, 4, 1), PipelineConfig("interleaved", 2), "none", "step", 2048),
    ("llama3-8b", (1, 1, 8, 1), PipelineConfig(), "none", "step", 8192),
    ("llama3-70b", (2, 1, 1, 4), PipelineConfig(), "none", "layer", 8192),
]


@pytest.mark.parametrize("model, mesh, pipeline, remat, gather, seq_len", [*REAL[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in REAL[2:])])
def test_total_of_real_models(model, mesh, pipeline, remat, gather, seq_len):
    """Compiled only: no array is made. What fits by the plan fits."""
    planned = job(model, mesh, pipeline, remat, gather, seq_len, batch_per_dp=4)
    assert 0.98 < memory.estimate(planned)["total"] / allocated(planned) < 1.05


def test_kinds_add_up_and_are_what_the_declarations_say():
    found = memory.estimate(job("llama-5m", (1, 1, 1, 1)))
    assert sum(found.values()) == 2 * found["total"]
    num_parameters = 5_475_584
    assert found["parameters"] == 4 * num_parameters and found["optimizer"] == 8 * num_parameters and found["gathered_weights"] == 0


def test_activations_follow_the_schedule_not_the_micro_batches():
    activations = lambda pipeline, batch: memory.estimate(job("llama-5m", (1, 1, 4, 1), pipeline, batch_per_dp=batch))["activations"]
    one_forward = [activations(PipelineConfig("1f1b"), batch) for batch in (8, 16, 32)]
    assert one_forward[0] == one_forward[1] == one_forward[2]
    assert activations(PipelineConfig("gpipe"), 32) > 5 * one_forward[2]
    assert one_forward[0] < activations(PipelineConfig("zero_bubble"), 8)  # the kept cotangents are its price


def test_the_paper_trains_8k_rows_without_recomputing():
    """Section 3.3.2: 405B on 8,192 GPUs of 80 GB, remat none; on half as many micro-batches in flight as it has, no more."""
    pipeline = PipelineConfig("interleaved", 8)
    found = memory.estimate(job("llama3-405b", (8, 1, 16, 64), pipeline, seq_len=8192, batch_per_dp=32, hardware=HARDWARE["h100"]))
    assert found["total"] < HARDWARE["h100"].memory_bytes
