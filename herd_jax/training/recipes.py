"""The paper's recipe as configurations of runs, for the files in `configs/`: pre-training, its annealing and its long context (section 3.4)."""

import dataclasses

import numpy as np

from herd_jax.data.rows import DataConfig, MixPhase
from herd_jax.mesh import MeshConfig
from herd_jax.models.config import ModelConfig
from herd_jax.models.rope import RopeScaling
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig
from herd_jax.training.config import EvalConfig, PhaseConfig, RunConfig, TrainConfig
from herd_jax.training.optimizer import OptimizerConfig, learning_rate
from herd_jax.training.stages.config import GateConfig, StageConfig

MIX = {"data/general": 0.50, "data/math_and_reasoning": 0.25, "data/code": 0.17, "data/multilingual": 0.08}  # section 3.1.2
ANNEALING_MIX = {"data/general": 0.30, "data/math_and_reasoning": 0.35, "data/code": 0.30, "data/multilingual": 0.05}  # undisclosed: ours
NUM_STEPS = 1_100_929  # 15.6T tokens by the ramp


def batch_ramp(dp: int, seq_len: int = 8192) -> tuple[PhaseConfig, ...]:
    """Returns phases of 4M, 8M and 16M tokens a step; a micro-batch is one sequence on each dp rank."""

    def phase(from_tokens: int, mega_tokens: int, length: int) -> PhaseConfig:
        batch = mega_tokens * 1024 * 1024 // length
        return PhaseConfig(from_tokens, batch, length, batch // dp)

    return phase(0, 4, seq_len // 2), phase(252_000_000, 8, seq_len), phase(2_870_000_000_000, 16, seq_len)


def pretraining(model: str, peak_learning_rate: float, tp: int, pp: int, dp: int, num_chunks: int = 1, gather: str = "step") -> RunConfig:
    """Returns the 405B's recipe, which the 8B and the 70B share but for the peak learning rate.

    Not disclosed, and ours: b1, b2, weight decay, clipping, the meshes of the 8B and the 70B, the number of chunks of a pipeline rank (the
    405B's 126 layers, embedding and head make 16 x 8).
    """
    return RunConfig(
        workdir=f"runs/{model}",
        model=ModelConfig(model, rope_scaling=RopeScaling(factor=1.0)),  # scaling comes with long context (section 3.4.2)
        mesh=MeshConfig(tp=tp, pp=pp, dp=dp),
        pipeline=PipelineConfig("interleaved" if num_chunks > 1 else "1f1b", num_chunks),
        data=DataConfig(MIX),
        train=TrainConfig(num_steps=NUM_STEPS, phases=batch_ramp(dp), gather=gather),
        optimizer=OptimizerConfig(
            peak_learning_rate=peak_learning_rate,
            final_learning_rate=peak_learning_rate / 100,
            warmup_steps=8000,
            decay_steps=1_200_000,
            weight_decay=0.1,
            clip_norm=1.0,
            b1=0.9,
            b2=0.95,
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=5),
        eval=EvalConfig(every_steps=2000, num_batches=4),
    )


def annealing(run: RunConfig, num_tokens: int, sources: dict[str, float], num_checkpoints: int = 10) -> RunConfig:
    """Returns `run` with its last phase, annealing (section 3.4.3).

    After `train.num_steps` the same workdir goes on for `num_tokens` with the rate falling linearly to 0, on the mixture `sources`, and keeps
    `num_checkpoints` checkpoints of it for `python -m herd_jax.average --last`.
    """
    start, ramp = run.train.num_steps, run.train.ramp
    num_steps = -(-num_tokens // ramp.phase_at(start).tokens_per_step)
    return dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, num_steps=start + num_steps),
        optimizer=dataclasses.replace(run.optimizer, anneal_from=start, anneal_steps=num_steps),
        data=dataclasses.replace(run.data, phases=(*run.data.phases, MixPhase(ramp.tokens_before(start), sources))),
        checkpoint=dataclasses.replace(run.checkpoint, every_steps=max(1, num_steps // num_checkpoints), keep=num_checkpoints),
    )


def long_context(run: RunConfig, seq_lens: tuple[int, ...], cps: tuple[int, ...], num_tokens: int = 800_000_000_000) -> RunConfig:
    """Returns `run` as the first of several stages, and a stage for each of `seq_lens`, its context parallelism from `cps` (section 3.4.2).

    The paper has six stages and about 800B tokens. Not disclosed, and ours: that these are the last of the 15.6T, the lengths between, equal
    shares of the tokens, the learning rate (the pre-training's cosine goes on), and RoPE scaling (that of the release) from the first on.
    """
    ramp, mesh, rate = run.train.ramp, run.mesh, learning_rate(run.optimizer, np)
    tokens_per_step = ramp.phases[-1].tokens_per_step
    done = ramp.tokens_before(run.train.num_steps) - num_tokens
    stages = [StageConfig(ramp.phases[-1].seq_len, done, gate=GateConfig(needle_recall=0.0))]
    for seq_len, cp in zip(seq_lens, cps, strict=True):
        dp, tokens = mesh.cp * mesh.dp // cp, num_tokens // len(seq_lens)
        batch = tokens_per_step // seq_len // dp * dp
        stages.append(
            StageConfig(
                seq_len,
                tokens,
                global_batch_size=batch,
                num_micro_batches=batch // dp,
                mesh=dataclasses.replace(mesh, cp=cp, dp=dp),
                rope_scaling=RopeScaling(factor=8.0),
                learning_rate=float(rate(ramp.step_at(done))),
                final_learning_rate=float(rate(ramp.step_at(done + tokens))),
            )
        )
        done += tokens
    default = TrainConfig.__dataclass_fields__["num_steps"].default  # stages say instead how long the run is
    return dataclasses.replace(run, train=dataclasses.replace(run.train, num_steps=default, stages=tuple(stages)))
