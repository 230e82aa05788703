"""The configuration of a run, put together from those of its parts, and the checks that need more than one part."""

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
from jax.sharding import Mesh

from herd_jax.config import check_name
from herd_jax.data.ramp import Phase, Ramp
from herd_jax.data.rows import DataConfig
from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.mesh import MeshConfig
from herd_jax.models.attention.attention import choose
from herd_jax.models.config import ModelConfig
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.reliability.watchdog import WatchdogConfig
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig
from herd_jax.training.optimizer import OptimizerConfig, make_optimizer
from herd_jax.training.spikes import ON_SPIKE
from herd_jax.training.stages.config import GateConfig, StageConfig, check_order
from herd_jax.training.state import StatePlan
from herd_jax.training.step import Steps
from herd_jax.training.task import Task

COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """One phase of the batch ramp."""

    from_tokens: int  # tokens trained on before the first step of the phase
    global_batch_size: int  # sequences a step, over all devices
    seq_len: int  # tokens of a sequence
    num_micro_batches: int = 0  # of each dp rank in a step; 0: train.num_micro_batches


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and on what shapes a run trains, and how a step is computed. `phases` are the ramp of the first of `stages`, where both are
    given."""

    num_steps: int = 1000  # optimizer steps of the whole run
    global_batch_size: int = 32  # sequences a step, over all devices
    seq_len: int = 512  # tokens of a sequence
    num_micro_batches: int = 1  # of each dp rank in a step
    phases: tuple[PhaseConfig, ...] = ()  # batch ramp, as the tokens trained on grow; replaces global_batch_size and seq_len
    stages: tuple[StageConfig, ...] = ()  # the run in stages of growing length; replaces num_steps and seq_len
    gate: GateConfig = GateConfig()  # after each stage
    compute_dtype: str = "auto"  # auto: bfloat16 on accelerators, float32 on CPU
    attention: str = "auto"  # auto | dense | blockwise | tokamax | cudnn
    remat: str = "none"  # none | attention | layer: what the backward recomputes
    gather: str = "step"  # step | layer: how often FSDP gathers the weights
    on_spike: str = "stop"  # stop | skip | rewind, where the loss or its gradient is not finite or a spike (herd_jax/training/spikes.py)
    spike_factor: float = math.inf  # a spike is above the median + so many interquartile ranges; inf: only what is not finite
    spike_window: int = 100  # of so many steps
    verify_every_steps: int = 0  # so often a step is computed twice and must give the same bits; 0: never (herd_jax/training/corruption.py)
    watchdog: WatchdogConfig = WatchdogConfig()
    compilation_cache: bool = True  # compiled programs are kept in the workdir

    def __post_init__(self):
        if self.num_steps < 1:
            raise UserError(f"train.num_steps is {self.num_steps}: it must be 1 or more")
        if self.compute_dtype not in ("auto", *COMPUTE_DTYPES):
            raise UserError(f"train.compute_dtype is '{self.compute_dtype}': it must be one of auto, {', '.join(COMPUTE_DTYPES)}")
        if self.verify_every_steps < 0:
            raise UserError(f"train.verify_every_steps is {self.verify_every_steps}: it must be 1 or more, or 0 for never")
        if self.on_spike not in ON_SPIKE:
            raise UserError(f"train.on_spike is '{self.on_spike}': it must be one of {', '.join(ON_SPIKE)}")
        if not self.spike_factor > 0:
            raise UserError(f"train.spike_factor is {self.spike_factor}: it must be more than 0 (inf: only what is not finite)")
        if self.spike_window < 4:
            raise UserError(f"train.spike_window is {self.spike_window}: it must be 4 or more, to have quartiles")
        if self.stages:
            self._check_stages()

    def _check_stages(self) -> None:
        check_order(self.stages)
        first = self.stages[0]
        for name, implied in (("num_steps", ()), ("seq_len", (first.seq_len,))):
            if getattr(self, name) not in (TrainConfig.__dataclass_fields__[name].default, *implied):
                raise UserError(f"train.{name} is {getattr(self, name)} and train.stages say it stage by stage: leave train.{name} out")
        if self.phases and (self.phases[-1].seq_len != first.seq_len or first.global_batch_size or first.num_micro_batches):
            raise UserError(
                f"train.phases, the ramp of the first of train.stages, must end with its seq_len {first.seq_len}, and that stage must leave "
                "its batch to them: change one of them"
            )

    @property
    def ramp(self) -> Ramp:
        phases = self.phases or (PhaseConfig(0, self.global_batch_size, self.seq_len),)
        return Ramp(tuple(Phase(p.from_tokens, p.global_batch_size, p.seq_len, p.num_micro_batches or self.num_micro_batches) for p in phases))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How often a run is evaluated on held-out data."""

    every_steps: int = 100  # steps between two evaluations; the last step is evaluated too
    num_batches: int = 8  # held-out batches, the same at each evaluation

    def __post_init__(self):
        for name in ("every_steps", "num_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"eval.{name} is {getattr(self, name)}: it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often a run says how it goes."""

    every_steps: int = 10  # steps between two lines of metrics

    def __post_init__(self):
        if self.every_steps < 1:
            raise UserError(f"log.every_steps is {self.every_steps}: it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class ResumeConfig:
    """What may change when a run goes on from its checkpoint."""

    allow: tuple[str, ...] = ()  # fields that may differ from the checkpoint's from here on, such as optimizer.peak_learning_rate; noted in history.jsonl


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that `python -m herd_jax.train` reads."""

    # A resumed run must agree with its checkpoint in these; everything else (mesh, logging, kernels) may change.
    settled: ClassVar = ("seed", "init_from", "init_moments", "model", "data", "optimizer", "train.global_batch_size", "train.seq_len", "train.phases")

    workdir: str  # directory of the run: checkpoints, metrics, logs; the same command continues what is there
    data: DataConfig
    seed: int = 0  # of the first weights and the order of the data
    init_from: str = ""  # a model in any known format, or WORKDIR@STEP: its weights to begin with, its dimensions instead of `model`
    init_moments: bool = False  # whether init_from, a checkpoint of a run, gives the optimizer's moments too
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    resume: ResumeConfig = ResumeConfig()

    @property
    def directory(self) -> Path:
        """Returns the workdir as a path."""
        return user_path(self.workdir)

    def __post_init__(self):
        if not self.workdir:
            raise UserError("workdir is empty: give the run a directory with --config.workdir=DIR")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: it must be 0 or more")
        if self.init_moments and not self.init_from:
            raise UserError("init_moments is true and init_from is empty: name the run or its checkpoint, init_from=WORKDIR@STEP")
        for name in self.resume.allow:
            check_name(RunConfig, name, "resume.allow")
        if self.optimizer.anneal_steps and self.train.stages:
            raise UserError("optimizer.anneal_steps ends a run and train.stages are several: continue the last stage's own workdir to anneal it")
        end = self.optimizer.anneal_from + self.optimizer.anneal_steps
        if self.optimizer.anneal_steps and self.train.num_steps > end:
            raise UserError(
                f"train.num_steps is {self.train.num_steps} and the learning rate is 0 from step {end} on, the end of optimizer.anneal_steps: "
                f"set train.num_steps to at most {end}"
            )


def build_steps(config: RunConfig, mesh: Mesh, task: Task) -> Steps:
    """Returns the model, its state and steps of a task on a mesh. Raises UserError for a combination that cannot work."""
    model_config = config.model.resolve()
    model_config.check_mesh(mesh)
    if model_config.reward != task.has_rewards:
        wrong, right = ("a reward model", "a language model") if model_config.reward else ("a language model", "a reward model")
        raise UserError(f"the model is {wrong} and the {task.name} task trains {right}: begin with another, or leave model.reward out")
    config.pipeline.check_ranks(mesh.shape["pp"])
    check_batches(config.train.ramp, mesh)
    platform = mesh.devices.flat[0].platform
    attention = choose(
        config.train.attention, platform=platform, context_parallel=mesh.shape["cp"] > 1, document_mask=config.data.document_mask
    )
    dtype = ("float32" if platform == "cpu" else "bfloat16") if config.train.compute_dtype == "auto" else config.train.compute_dtype
    if attention == "cudnn" and dtype == "float32":
        raise UserError("train.attention 'cudnn' computes in bfloat16 only: set train.compute_dtype=bfloat16 or choose 'auto'")
    model = Llama.make(model_config, attention, config.train.remat)
    layout = Layout.make(mesh, model_config.num_layers, config.pipeline.num_chunks)
    plan = StatePlan(model.declared, make_optimizer(config.optimizer, model.declared), layout)
    return Steps(task, model, layout, plan, config.optimizer, COMPUTE_DTYPES[dtype], config.train.gather, config.pipeline)


def check_batches(ramp: Ramp, mesh: Mesh) -> None:
    """Raises UserError where a batch does not divide over dp or a sequence over tp and cp."""
    dp, cp, tp = mesh.shape["dp"], mesh.shape["cp"], mesh.shape["tp"]
    parts = tp * cp * (2 if cp > 1 else 1)
    for phase in ramp.phases:
        if phase.global_batch_size % (phase.num_micro_batches * dp):
            raise UserError(
                f"train.global_batch_size {phase.global_batch_size} does not divide by train.num_micro_batches {phase.num_micro_batches} "
                f"x mesh.dp {dp}: change one of them"
            )
        if phase.seq_len % parts:
            halves = " x 2 zigzag chunks" if cp > 1 else ""
            raise UserError(
                f"train.seq_len {phase.seq_len} does not divide by mesh.tp {tp} x mesh.cp {cp}{halves} = {parts}: choose a multiple of {parts}"
            )
