"""A run as a list of stages (section 3.4.2 of the paper): each is a run of its own, in WORKDIR/stages/NUMBER-LENGTH, that begins with the
whole state of the one before, at step 0 of its own schedule and on a mesh of its own. Between two stages a gate decides whether the next
one begins.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jax.experimental import multihost_utils

from herd_jax.config import NOT_GIVEN, to_dict
from herd_jax.errors import UserError
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.models.config import ModelConfig
from herd_jax.reliability.run_lock import only_run
from herd_jax.reliability.signals import ending_at_once
from herd_jax.reliability.timeline import Timeline
from herd_jax.reliability.watchdog import Watchdog
from herd_jax.reliability.workdir import CHECKPOINTS, STAGES, stage_name
from herd_jax.text.tokenizer import Tokenizer
from herd_jax.training.checkpoints.checkpoint import Checkpointer
from herd_jax.training.checkpoints.local_and_durable import delete_local
from herd_jax.training.config import RunConfig, build_steps
from herd_jax.training.loop import train
from herd_jax.training.resume import Identities, Initial, changes, identities
from herd_jax.training.stages.config import StageConfig
from herd_jax.training.stages.decisions import Decisions, Verdict
from herd_jax.training.state import State
from herd_jax.training.step import Steps
from herd_jax.training.task import Task, TaskData


class Gate(Protocol):
    def check(self, stages: Sequence[RunConfig]) -> None:
        """Raises UserError where it will not be able to judge one of the stages."""

    def __call__(self, stages: Sequence[RunConfig], number: int, short_loss_before: float | None) -> Verdict:
        """Judges the newest checkpoint of stage `number` (from 1) by the short-context loss at the end of the first (None: it is the first).

        Every process makes this call.
        """


def stage_configs(config: RunConfig) -> list[RunConfig]:
    """Returns each stage as a run of its own; the run itself where it has no stages. Raises UserError for a stage that is impossible."""
    configs = []
    for number, stage in enumerate(config.train.stages, start=1):
        if number > 1 and stage.data is None and config.data.phases:
            raise UserError(f"data.phases count the tokens of one stage: give stage {number} of train.stages its own data")
        with _of_stage(number):
            configs.append(_stage_config(config, number, stage))
    return configs or [config]


def devices_of(config: RunConfig) -> MeshConfig:
    """Returns a mesh of as many devices as every stage's has. Raises UserError where their numbers differ."""
    meshes = [stage.mesh for stage in stage_configs(config)]
    inner = [mesh.tp * mesh.cp * mesh.pp for mesh in meshes]
    fixed = {size * mesh.dp for size, mesh in zip(inner, meshes) if mesh.dp}
    if len(fixed) > 1 or any(num_devices % size for num_devices in fixed for size in inner):
        sizes = ", ".join(f"{size * mesh.dp}" if mesh.dp else f"a multiple of {size}" for size, mesh in zip(inner, meshes))
        raise UserError(f"the meshes of train.stages take {sizes} devices: give all of them the same number, or mesh.dp 0 for what is left")
    return next((mesh for mesh in meshes if mesh.dp), dataclasses.replace(meshes[0], tp=1, pp=1, cp=math.lcm(*inner)))


def train_stages(config: RunConfig, task: Task, gate: Gate, initial: Initial | None = None) -> None:
    """Trains `task` in a run to its end, stage by stage where it has stages; the same command goes on wherever it was interrupted.

    Raises as `train`, and UserError where a stage has not passed the gate within the rounds that it may train on.
    """
    workdir = config.directory
    if not config.train.stages:
        if (workdir / STAGES).exists():
            raise UserError(f"{workdir} holds a run with stages and train.stages is empty: give them again, or another workdir")
        return train(config, task, initial)
    if (workdir / CHECKPOINTS).exists():
        raise UserError(f"{workdir} holds a run without stages: choose another workdir, and begin with that run by init_from={workdir}")
    stages = stage_configs(config)
    data = _check(stages, task, gate)
    with only_run(workdir):
        decisions = Decisions(workdir)
        for number, (stage, of_stage) in enumerate(zip(stages, data), start=1):
            _require_as_passed(stage, number, decisions.last(number), identities(stage, of_stage, initial))
        _train_in_order(stages, task, gate, initial, decisions)


def _require_as_passed(stage: RunConfig, number: int, last: dict | None, known: Identities) -> None:
    """Raises UserError where a stage that has passed its gate was trained with other settings than it has now."""
    newest = Checkpointer(_checkpoints(stage), keep=1).newest() if last and last["verdict"] == "passed" else None
    if newest is None:
        return
    names = [change.name for change in changes(newest[1], stage, known)]
    names += ["tokens"] if last.get("asked_steps", stage.train.num_steps) != stage.train.num_steps else []
    if names:
        raise UserError(
            f"stage {number} of train.stages has passed its gate with other values of {', '.join(names)}: give the values that it was trained "
            f"with, or another workdir, and begin there with this run by init_from={stage.workdir}"
        )


def _train_in_order(stages: list[RunConfig], task: Task, gate: Gate, begin: Initial | None, decisions: Decisions) -> None:
    for number, stage in enumerate(stages, start=1):
        last = decisions.last(number)
        if last is None or last["verdict"] != "passed":
            _train_until_passed(stages, task, number, begin, gate, decisions)
        elif number == len(stages) or not _has_begun(stages[number]):
            train(_to_step(stage, last["steps"]), task, begin)  # does nothing, unless its last checkpoint cannot be read
        begin = _StageBefore(number, stage, decisions.last(number)["steps"])


def _train_until_passed(
    stages: list[RunConfig], task: Task, number: int, begin: Initial | None, gate: Gate, decisions: Decisions
) -> None:
    stage, last = stages[number - 1], decisions.last(number)
    limits, ramp = stage.train.gate, stage.train.ramp
    round_tokens = limits.round_tokens or -(-ramp.tokens_before(stage.train.num_steps) // 10)
    stage = _to_step(stage, max(stage.train.num_steps, (last["trains_to"] or last["steps"]) if last else 0))
    max_rounds = 0 if stage.optimizer.anneal_steps else limits.max_rounds  # at a learning rate of 0 it would go on without learning
    while last is None or last["verdict"] != "passed":
        if last and last["verdict"] == "stopped" and last["gate"] == to_dict(limits):
            raise UserError(
                f"stage {number} of train.stages did not pass its gate ({last['reason']}), also after {decisions.num_rounds(number)} further "
                "rounds of training: raise max_rounds of train.gate, or ask for less there, and the same command goes on"
            )
        train(stage, task, begin)
        num_steps = stage.train.num_steps
        with _watched_evaluation(stage), ending_at_once("at the gate after a stage"):
            verdict = gate(stages, number, decisions.short_loss)
        passed = bool(multihost_utils.broadcast_one_to_all(np.array(verdict.passed)))  # all processes go the same way
        trains_on = not passed and decisions.num_rounds(number) < max_rounds
        trains_to = ramp.step_at(ramp.tokens_before(num_steps) + round_tokens)
        last = decisions.add(number, stage, stages[number - 1].train.num_steps, passed, trains_to if trains_on else None, verdict)
        stage = _to_step(stage, trains_to) if trains_on else stage
    delete_local(_checkpoints(stage), stage.checkpoint)


@dataclasses.dataclass(frozen=True)
class _StageBefore:
    """The state at the end of a stage, after `num_steps` steps, with which the next one begins."""

    number: int
    stage: RunConfig
    num_steps: int

    @property
    def context_length(self) -> int:
        """Returns the longest sequences of that stage, or what it began with."""
        _, record = Checkpointer(_checkpoints(self.stage), keep=1).newest() or (None, {"position": {}})
        longest = max(phase.seq_len for phase in self.stage.train.ramp.phases)
        return max(longest, record["position"].get("context_length") or 0)

    def load_state(self, steps: Steps, seed: int) -> State:
        """Returns a state with that stage's parameters, optimizer moments and their age; its step, the clock of the schedule, is 0."""
        checkpointer = Checkpointer(_checkpoints(self.stage), self.stage.checkpoint.keep)
        restored = checkpointer.restore(steps.plan.abstract_canonical())
        checkpointer.close()
        if restored is None or restored.step != self.num_steps:
            raise UserError(f"the last checkpoint of stage {self.number} cannot be read: the same command trains the end of that stage again")
        return steps.plan.at_its_beginning(restored.state)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Does nothing: the tokenizers of all stages were compared before the first."""


def _stage_config(config: RunConfig, number: int, stage: StageConfig) -> RunConfig:
    batch = {name: getattr(stage, name) or getattr(config.train, name) for name in ("global_batch_size", "num_micro_batches")}
    phases = config.train.phases if number == 1 else ()
    train = dataclasses.replace(config.train, stages=(), seq_len=stage.seq_len, phases=phases, gate=stage.gate or config.train.gate, **batch)
    train = dataclasses.replace(train, num_steps=train.ramp.step_at(stage.tokens))
    optimizer = config.optimizer
    if stage.learning_rate is not None:
        optimizer = dataclasses.replace(
            optimizer,
            peak_learning_rate=stage.learning_rate,
            final_learning_rate=stage.final_learning_rate or stage.learning_rate,
            warmup_steps=stage.warmup_steps,
            decay_steps=train.num_steps,
            anneal_from=stage.warmup_steps,
            anneal_steps=train.num_steps - stage.warmup_steps if stage.final_learning_rate == 0 else 0,
        )
    return dataclasses.replace(
        config,
        workdir=str(config.directory / STAGES / stage_name(number, stage.seq_len)),
        seed=config.seed if number == 1 else int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]),  # other batches
        init_from=config.init_from if number == 1 else "",
        model=_stage_model(config.model, stage),
        mesh=stage.mesh or config.mesh,
        pipeline=stage.pipeline or config.pipeline,
        data=stage.data or config.data,
        train=train,
        optimizer=optimizer,
    )


def _stage_model(model: ModelConfig, stage: StageConfig) -> ModelConfig:
    scaling = model.rope_scaling if stage.rope_scaling is NOT_GIVEN else stage.rope_scaling
    return dataclasses.replace(model, rope_theta=stage.rope_theta or model.rope_theta, rope_scaling=scaling)


def _check(stages: list[RunConfig], task: Task, gate: Gate) -> list[TaskData]:
    """Returns what each stage reads; raises UserError before the first one for what would be an error when a later one begins."""
    fingerprint, opened = None, []
    for number, stage in enumerate(stages, start=1):
        with _of_stage(number):
            opened.append(task.open(stage, build_steps(stage, make_mesh(stage.mesh), task)))
            tokenizer = opened[-1].tokenizer
            fingerprint = fingerprint or tokenizer.fingerprint
            if tokenizer.fingerprint != fingerprint:
                raise UserError("its data.sources were made with another tokenizer than those of the first stage: use the same one")
    gate.check(stages)
    return opened


@contextlib.contextmanager
def _of_stage(number: int) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"stage {number} of train.stages: {error}") from error


@contextlib.contextmanager
def _watched_evaluation(stage: RunConfig) -> Iterator[None]:
    """Records what is done inside, after the last step of the stage, as an evaluation in its timeline, and watches that it does not hang."""
    workdir = stage.directory
    timeline = Timeline(workdir, time.time(), begins=False)
    timeline.rename("evaluation")
    timeline.begin(stage.train.num_steps)
    try:
        with Watchdog(stage.train.watchdog, timeline, workdir):
            yield
    finally:
        timeline.close()


def _to_step(stage: RunConfig, num_steps: int) -> RunConfig:
    return dataclasses.replace(stage, train=dataclasses.replace(stage.train, num_steps=num_steps))


def _checkpoints(stage: RunConfig) -> Path:
    return stage.directory / CHECKPOINTS


def _has_begun(stage: RunConfig) -> bool:
    return bool(Checkpointer(_checkpoints(stage), keep=1).steps())
