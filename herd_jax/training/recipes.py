"""Pieces of run configs, for the files in `configs/` to put together: the paper's pre-training recipe (facts: sections E and D.2)."""

import math

from ml_collections import ConfigDict

from herd_jax.config import parse
from herd_jax.training.config import RunConfig
from herd_jax.training.optimizer import OptimizerConfig

MIX = "data/general:0.50,data/math_and_reasoning:0.25,data/code:0.17,data/multilingual:0.08"  # section 3.1.2
ANNEALING_MIX = "data/general:0.30,data/math_and_reasoning:0.35,data/code:0.30,data/multilingual:0.05"  # not disclosed, and ours
NUM_STEPS = 1_100_929  # 15.6T tokens by the ramp


def batch_ramp(dp: int, seq_len: int = 8192) -> tuple[dict, ...]:
    """4M, 8M and 16M tokens a step; a micro-batch is one sequence on each dp rank."""
    phases = ((0, 4, seq_len // 2), (252_000_000, 8, seq_len), (2_870_000_000_000, 16, seq_len))
    return tuple(
        {
            "from_tokens": from_tokens,
            "global_batch_size": (mega * 1024 * 1024) // length,
            "seq_len": length,
            "num_micro_batches": (mega * 1024 * 1024) // length // dp,
        }
        for from_tokens, mega, length in phases
    )


def pretraining(model: str, peak_learning_rate: float, tp: int, pp: int, dp: int, num_chunks: int = 1, gather: str = "step") -> ConfigDict:
    """The 405B's recipe, which the 8B and the 70B share but for the peak learning rate.

    Not disclosed, and ours: b1, b2, weight decay, clipping, the meshes of the 8B and the 70B, the number of chunks of a pipeline rank (the
    405B's 126 layers, embedding and head make 16 x 8).
    """
    return ConfigDict(
        {
            "seed": 0,
            "workdir": f"runs/{model}",
            "model": {"name": model, "rope_scaling": {"factor": 1.0}},  # scaling comes with long context (section 3.4.2)
            "mesh": {"tp": tp, "cp": 1, "pp": pp, "dp": dp},
            "pipeline": {"schedule": "interleaved" if num_chunks > 1 else "1f1b", "num_chunks": num_chunks},
            "data": {"sources": MIX},
            "train": {"num_steps": NUM_STEPS, "phases": batch_ramp(dp), "gather": gather},
            "optimizer": {
                "peak_learning_rate": peak_learning_rate,
                "final_learning_rate": peak_learning_rate / 100,
                "warmup_steps": 8000,
                "decay_steps": 1_200_000,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                "b1": 0.9,
                "b2": 0.95,
            },
            "checkpoint": {"every_steps": 500, "keep": 5},
            "eval": {"every_steps": 2000, "num_batches": 4},
        }
    )


def annealing(config: ConfigDict, num_tokens: int, sources: str | dict[str, float], num_checkpoints: int = 10) -> ConfigDict:
    """`config` with its last phase (section 3.4.3): after `train.num_steps` the same workdir goes on for `num_tokens` with the rate falling
    linearly to 0, on the mixture `sources`, and keeps `num_checkpoints` checkpoints of it for `python -m herd_jax.average --last`.
    """
    run = parse(RunConfig, config.to_dict())
    start, ramp = run.train.num_steps, run.train.ramp
    num_steps = -(-num_tokens // ramp.phase_at(start).tokens_per_step)
    annealed = ConfigDict(config.to_dict())
    annealed.train.num_steps = start + num_steps
    annealed.optimizer.anneal_from, annealed.optimizer.anneal_steps = start, num_steps
    annealed.data.phases = (*config.data.get("phases", ()), {"from_tokens": ramp.tokens_before(start), "sources": sources})
    annealed.checkpoint.every_steps, annealed.checkpoint.keep = max(1, num_steps // num_checkpoints), num_checkpoints
    return annealed


def long_context(config: ConfigDict, seq_lens: tuple[int, ...], cps: tuple[int, ...], num_tokens: int = 800_000_000_000) -> ConfigDict:
    """`config` as the first of several stages, and a stage for each of `seq_lens`, its context parallelism from `cps` (section 3.4.2).

    The paper has six stages and about 800B tokens. Not disclosed, and ours: that these are the last of the 15.6T, the lengths between, equal
    shares of the tokens, the learning rate (the pre-training's cosine goes on), and RoPE scaling (that of the release) from the first on.
    """
    run = parse(RunConfig, config.to_dict())
    ramp, mesh = run.train.ramp, run.mesh
    tokens_per_step = ramp.phases[-1].tokens_per_step
    done = ramp.tokens_before(run.train.num_steps) - num_tokens
    stages = [{"seq_len": ramp.phases[-1].seq_len, "tokens": done, "gate": {"needle_recall": 0.0}}]
    for seq_len, cp in zip(seq_lens, cps, strict=True):
        dp, tokens = mesh.cp * mesh.dp // cp, num_tokens // len(seq_lens)
        batch = tokens_per_step // seq_len // dp * dp
        stages.append(
            {
                "seq_len": seq_len,
                "tokens": tokens,
                "global_batch_size": batch,
                "num_micro_batches": batch // dp,
                "mesh": {"tp": mesh.tp, "cp": cp, "pp": mesh.pp, "dp": dp},
                "rope_scaling": {"factor": 8.0},
                "learning_rate": _cosine(run.optimizer, ramp.step_at(done)),
                "final_learning_rate": _cosine(run.optimizer, ramp.step_at(done + tokens)),
            }
        )
        done += tokens
    lengthened = ConfigDict(config.to_dict())
    del lengthened.train.num_steps
    lengthened.train.stages = tuple(stages)
    return lengthened


def _cosine(optimizer: OptimizerConfig, step: int) -> float:
    """The learning rate at a step after the warmup, without jax, which may not start before a config is read."""
    progress = (step - optimizer.warmup_steps) / (optimizer.decay_steps - optimizer.warmup_steps)
    span = optimizer.peak_learning_rate - optimizer.final_learning_rate
    return optimizer.final_learning_rate + span * (1 + math.cos(math.pi * progress)) / 2
