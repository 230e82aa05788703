"""The jobs of a run: one for each phase of its batch ramp, in each of its stages, from the run's own config."""

import dataclasses
from typing import Any

from herd_jax.errors import UserError
from herd_jax.machines import hardware
from herd_jax.planning.job import Job
from herd_jax.training.config import RunConfig
from herd_jax.training.stages.stages import stage_configs


@dataclasses.dataclass(frozen=True)
class RunPhase:
    """A phase of a run: `job` is repeated until `tokens` are trained on."""

    job: Job
    tokens: int


def run_phases(config: RunConfig, hardware_name: str, overrides: dict[str, Any], pipeline_overrides: dict[str, Any]) -> list[RunPhase]:
    """Returns the phases of a run in order, with fields of Job and of PipelineConfig in place of what the config says.

    Raises UserError where mesh.dp is left open, and for impossible layouts.
    """
    phases = []
    for stage in stage_configs(config):
        mesh = {axis: overrides.get(axis, getattr(stage.mesh, axis)) for axis in ("tp", "cp", "pp", "dp")}
        if not mesh["dp"]:
            raise UserError("mesh.dp is 0, which takes whatever devices a run finds: say with --dp how many are planned for")
        num_devices = mesh["tp"] * mesh["cp"] * mesh["pp"] * mesh["dp"]
        ramp, end = stage.train.ramp, stage.train.ramp.tokens_before(stage.train.num_steps)
        starts = [min(ramp.tokens_before(ramp.step_at(phase.from_tokens)), end) for phase in ramp.phases]
        for phase, start, stop in zip(ramp.phases, starts, [*starts[1:], end]):
            if stop <= start:
                continue
            batch_per_dp, rest = divmod(phase.global_batch_size, mesh["dp"])
            if rest:
                raise UserError(f"a batch of {phase.global_batch_size} sequences does not divide by dp {mesh['dp']}: choose another dp")
            fields = {"seq_len": phase.seq_len, "batch_per_dp": batch_per_dp, "micro_batch_size": max(1, batch_per_dp // phase.num_micro_batches)}
            fields |= mesh | {"remat": stage.train.remat, "gather": stage.train.gather} | overrides
            pipeline = dataclasses.replace(stage.pipeline, **pipeline_overrides)
            device = hardware.look_up(hardware_name, num_devices)
            phases.append(RunPhase(Job(stage.model.name, stage.model.resolve(), device, **fields, pipeline=pipeline), stop - start))
    return phases
