"""What is reported about a planned job (parameters, memory, speed, cost) and about a search."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from herd_jax.errors import UserError
from herd_jax.models import params
from herd_jax.models.llama import Llama
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.planning import memory, throughput
from herd_jax.planning.job import Job
from herd_jax.planning.run_phases import RunPhase
from herd_jax.planning.search import Search, describe
from herd_jax.planning.throughput import Throughput

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job and what is predicted of it. `budget`, in tokens, is what the days and the energy are for."""

    job: Job
    memory: dict[str, float]
    throughput: Throughput
    budget: int

    @property
    def num_parameters(self) -> int:
        return params.count(Llama.make(self.job.model).declared)

    @property
    def fits(self) -> bool:
        return self.memory["total"] <= self.job.hardware.memory_bytes

    @property
    def empty_layer_slots(self) -> int:
        """Returns how many slots of all pipeline ranks have no layer: such a slot takes the memory of its weights, and no time."""
        job = self.job
        return max(1, *job.layers_per_stage) * len(job.layers_per_stage) - job.model.num_layers

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan for JSON: bytes, seconds, fractions, tokens."""
        job, speed = self.job, self.throughput
        return {
            "model": job.model_name,
            "hardware": job.hardware.name,
            "layout": describe(job),
            "num_devices": job.num_devices,
            "num_micro_batches": job.num_micro_batches,
            "tokens_per_step": job.tokens_per_step,
            "num_parameters": self.num_parameters,
            "empty_layer_slots": self.empty_layer_slots,
            "fits": self.fits,
            "memory_bytes_per_device": self.memory,
            "memory_capacity_bytes": job.hardware.memory_bytes,
            "flops_per_token": speed.flops_per_token,
            "bubble_fraction": speed.bubble_fraction,
            "step_time_s": speed.step_time_s,
            "time_s": speed.time,
            "communication": speed.communication,
            "tflops_per_device": speed.tflops_per_device,
            "mfu": speed.mfu,
            "tokens_per_second": speed.tokens_per_second,
            "budget_tokens": self.budget,
            "days": speed.days(self.budget),
            "energy_mwh": speed.energy_mwh(self.budget),
        }

    def lines(self) -> list[str]:
        job, speed, capacity = self.job, self.throughput, self.job.hardware.memory_bytes
        total, energy = self.memory["total"], speed.energy_mwh(self.budget)
        room = f"{(capacity - total) / GB:.1f} GB to spare" if self.fits else f"does not fit: {(total - capacity) / GB:.1f} GB too much"
        return [
            f"{job.model_name}: {self.num_parameters:,} parameters, {speed.flops_per_token:.4g} FLOPs a token at {job.seq_len:,} tokens",
            f"{job.num_devices:,} x {job.hardware.name}: {describe(job)}",
            f"{job.tokens_per_step:,} tokens a step in {job.num_micro_batches} micro-batches on each dp rank",
            f"layers in {len(job.layers_per_stage)} stages of {max(1, *job.layers_per_stage)}; {self.empty_layer_slots} of these places are empty",
            "",
            f"memory of a device      {total / GB:>8.2f} GB of {capacity / GB:.1f}: {room}",
            *(f"  {kind.replace('_', ' '):<22}{size / GB:>8.2f} GB" for kind, size in self.memory.items() if kind != "total" and size),
            "",
            f"step                    {speed.step_time_s:>8.3f} s, bubble {speed.bubble_fraction:.1%}",
            *(f"  {kind:<22}{seconds:>8.3f} s  {seconds / speed.step_time_s:>6.1%}" for kind, seconds in speed.time.items() if seconds),
            "",
            "communication           sent by a device        takes     not hidden",
            *(
                f"  {axis:<22}{sent['bytes'] / GB:>13.2f} GB{sent['seconds']:>11.3f} s{sent['exposed_seconds']:>13.3f} s"
                for axis, sent in speed.communication.items()
                if sent["bytes"]
            ),
            "",
            f"speed                   {speed.tflops_per_device:>8.1f} TFLOP/s a device, {speed.mfu:.1%} MFU, {speed.tokens_per_second:,.0f} tokens/s",
            f"{self.budget:,} tokens take {speed.days(self.budget):,.1f} days"
            + ("" if energy is None else f" and {energy:,.0f} MWh (devices alone, at the limit of their power)"),
        ]


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The phases of a run and what is predicted of each, for its own tokens."""

    plans: tuple[Plan, ...]

    @classmethod
    def make(cls, phases: Sequence[RunPhase]) -> "RunPlan":
        return cls(tuple(plan(phase.job, phase.tokens) for phase in phases))

    def to_dicts(self) -> list[dict[str, Any]]:
        return [plan.to_dict() for plan in self.plans]

    def lines(self) -> list[str]:
        """Returns a table with a row for each phase, and the totals."""
        lines = [f"{'tokens':>10}{'tokens of':>10}{'tokens':>13}{'':>11}{'step':>10}{'':>7}{'':>9}", f"{'a row':>10}{'a step':>10}{'in all':>13}{'memory':>11}{'time':>10}{'MFU':>7}{'days':>9}"]
        for plan in self.plans:
            job, speed = plan.job, plan.throughput
            fits = "" if plan.fits else "  does not fit"
            lines.append(
                f"{job.seq_len:>10,}{_millions(job.tokens_per_step):>10}{_millions(plan.budget):>13}{plan.memory['total'] / GB:>8.1f} GB"
                f"{speed.step_time_s:>8.2f} s{speed.mfu:>7.1%}{speed.days(plan.budget):>9.1f}{fits}"
            )
        energies = [plan.throughput.energy_mwh(plan.budget) for plan in self.plans]
        energy = "" if None in energies else f", {sum(energies):,.0f} MWh"
        days = sum(plan.throughput.days(plan.budget) for plan in self.plans)
        total = sum(plan.budget for plan in self.plans)
        return [*lines, f"{total:,} tokens in {days:,.1f} days{energy}; failures are not counted (python -m herd_jax.plan goodput)", "", "the last phase:"]


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:,.1f}M" if tokens < 1e9 else f"{tokens / 1e9:,.1f}B"


def plan(job: Job, budget: int) -> Plan:
    return Plan(job, memory.estimate(job), throughput.estimate(job), budget)


def with_chosen_schedule(job: Job) -> Job:
    """Returns the job interleaved as in the paper: with the most chunks (a power of 2) that leave all stages equally full, the embedding and
    the head counted as a layer each. Where no number does, the schedule is the fastest one that fits, which may be 1F1B."""
    slots = job.model.num_layers + 2
    configs = [PipelineConfig()]
    while job.pp > 1 and 2 * configs[-1].num_chunks * job.pp <= slots:
        configs.append(PipelineConfig("interleaved", 2 * configs[-1].num_chunks))
    even = [config for config in configs if slots % (config.num_chunks * job.pp) == 0]
    jobs = [dataclasses.replace(job, pipeline=config) for config in even[-1:] or configs]
    if len(jobs) > 1:
        jobs = [job for job in jobs if memory.estimate(job)["total"] <= job.hardware.memory_bytes] or jobs
    return min(jobs, key=lambda job: throughput.estimate(job).step_time_s)


def mfu_over_devices(job: Job, factors: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)) -> list[tuple[int, float, str]]:
    """Returns (devices, MFU, label) of the layout with other dp: with the batch of a step kept, and with that of a dp rank kept."""
    points = []
    for factor in factors:
        dp = job.dp * factor
        for label, batch in (("the same tokens a step", job.batch_per_dp / factor), ("the same tokens a dp rank", job.batch_per_dp)):
            if dp != int(dp) or batch != int(batch) or not (dp and batch):
                continue
            try:
                other = dataclasses.replace(job, dp=int(dp), batch_per_dp=int(batch))
            except UserError:  # a layout that does not divide is not on the curve
                continue
            points.append((other.num_devices, throughput.estimate(other).mfu, label))
    return points


def search_lines(found: Search) -> list[str]:
    """Returns lines with the layouts that fit, fastest first, and why the rest are not among them."""
    lines = [f"{'':>4}{'MFU':>7}{'step':>10}{'tokens/s':>13}{'memory':>11}  layout"] if found.ranked else ["no layout fits"]
    for rank, candidate in enumerate(found.ranked, start=1):
        speed, total = candidate.throughput, candidate.memory["total"]
        lines.append(
            f"{rank:>4}{speed.mfu:>7.1%}{speed.step_time_s:>8.3f} s{speed.tokens_per_second:>13,.0f}{total / GB:>8.1f} GB  {describe(candidate.job)}"
        )
    lines += ["", "not listed:"]
    for rejection in sorted(found.rejections, key=lambda rejection: -rejection.count):
        lines.append(f"{rejection.count:>9,}  {rejection.reason}; e.g. {rejection.example}")
    return lines


def search_dict(found: Search, budget: int) -> dict[str, Any]:
    ranked = [Plan(candidate.job, candidate.memory, candidate.throughput, budget).to_dict() for candidate in found.ranked]
    return {"ranked": ranked, "rejections": [dataclasses.asdict(rejection) for rejection in found.rejections]}
