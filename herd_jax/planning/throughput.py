"""How long a training step takes, and where the time goes.

The operations of the pipeline's table take what `costs.py` says, and the simulator says when they run. Communication hides where our
steps let it:
  tp   in the backward, behind the matmuls of the weights' gradients (`costs.py`); in the forward each matmul waits for its input
  cp   nowhere: attention waits for the keys and values of the row, and the backward for their gradients
  pp   behind the next tick where `pipeline.overlap` is on, else nowhere
  dp   nowhere where weights are gathered once a step, before the first tick, and gradients summed after the last; else behind the
       matmuls of their layer
"""

import dataclasses

from herd_jax.planning import costs
from herd_jax.planning.job import Job
from herd_jax.planning.simulator import Costs, simulate

COLUMN_OF = {
    "forward": "forward_count", "backward": "full_count", "backward_input": "input_count", "backward_weight": "weight_count",
    "embed": "embed", "embed_backward": "embed_backward", "head": "head",
}  # operation -> the column of the table that counts it  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What a step takes. `time`, in seconds by kind, adds up to the step: matmul, attention, memory (element-wise work), tp, cp, pp and dp (exposed
    communication), optimizer, bubble (what pp ranks wait as the schedule has it) and imbalance (what they wait beyond that, because
    ticks are not equally long). Work is the mean over pp ranks.

    `communication` by axis: bytes that a device sends in a step, the seconds that takes, and those of them that nothing hides.
    `bubble_fraction` is the bubble over the work. `tflops_per_device` and `mfu` count the model's FLOPs, not what is recomputed.
    """

    flops_per_token: float
    tokens_per_step: int
    step_time_s: float
    bubble_fraction: float
    tflops_per_device: float
    mfu: float
    communication: dict[str, dict[str, float]]
    time: dict[str, float]
    power: float | None  # W, of all devices at their limit

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_time_s

    def days(self, tokens: float) -> float:
        """Returns the days that a budget of tokens takes, without interruptions."""
        return tokens / self.tokens_per_second / 86_400

    def energy_mwh(self, tokens: float) -> float | None:
        """Returns the energy of the devices alone at the limit of their power; hosts, network and cooling come on top.

        None where that limit is not published.
        """
        return None if self.power is None else self.days(tokens) * 24 * self.power / 1e6


def flops_per_token(job: Job) -> float:
    """Returns the FLOPs of the model alone, attention counted by the keys that the mask lets a query see.

    Table 4 of the paper seems to count attention causally, as here: counted in full, its third row would take so long (15 s) that attention
    could not have reached a quarter of the peak.
    """
    return job.model.flops_per_token(costs.keys_seen(job))


def estimate(job: Job) -> Throughput:
    """Returns what a step of the job takes."""
    operations, message, once = costs.operations(job), costs.message(job), costs.once_a_step(job)
    num_done = _num_done(job)
    busy = {kind: sum(num_done[name] * work[kind] for name, work in operations.items()) for kind in costs.KINDS}
    work_s = float(sum(busy.values())[0])
    num_ticks, waiting_s, bubble_s, messages_s = 0, 0.0, 0.0, 0.0
    if job.pp > 1:
        seconds = Costs(**{name: float(sum(work.values())[0]) for name, work in operations.items()})
        lasts = lambda message: simulate(job.table, dataclasses.replace(seconds, message=message), job.hardware.waits_for_all).duration
        num_ticks, alone = len(job.table.rows), lasts(0.0)
        waiting_s, messages_s = max(alone - work_s, 0.0), lasts(float(message[0])) - alone
        bubble_s = min(waiting_s, float(job.table.schedule.bubble_fraction) * work_s)

    time = {kind: float(spent[0]) for kind, spent in busy.items()}
    time |= {"pp": float(messages_s + once["pp"][0]), "dp": float(time["dp"] + once["dp"][0])}
    time |= {"optimizer": float(once["optimizer"][0]), "bubble": bubble_s, "imbalance": waiting_s - bubble_s}
    step = sum(time.values())
    sent = {"tp": busy["tp"], "cp": busy["cp"], "pp": num_ticks * message + once["pp"], "dp": busy["dp"] + once["dp"]}
    communication = {
        axis: {"bytes": float(num_bytes), "seconds": float(seconds + hidden), "exposed_seconds": time[axis]}
        for axis, (seconds, hidden, num_bytes) in sent.items()
    }
    flops = flops_per_token(job)
    flops_per_second = flops * job.tokens_per_step / step / job.num_devices
    power = None if job.hardware.power is None else job.hardware.power * job.num_devices
    return Throughput(
        flops, job.tokens_per_step, step, bubble_s / work_s, flops_per_second / 1e12, flops_per_second / job.hardware.peak_flops,
        communication, time, power,
    )  # fmt: skip


def approximate(job: Job) -> float:
    """Returns about the seconds of the job's step, or less, without making the table: the work of its busiest rank, its messages where nothing
    hides them, and the bubble of equally long ticks and many micro-batches. At most 5 % above `estimate` for models that are not toys."""
    work = {name: float(sum(kinds.values())[0]) for name, kinds in costs.operations(job).items()}
    splits = job.pipeline.schedule == "zero_bubble" and job.pp > 1
    layer = work["forward"] + (work["backward_input"] + work["backward_weight"] if splits else work["backward"])
    stages = [num_layers * layer for num_layers in job.layers_per_stage]
    stages[0] += work["embed"] + work["embed_backward"]
    stages[-1] += work["head"]
    ranks = [sum(stages[rank :: job.pp]) for rank in range(job.pp)]
    # With split backwards one tick of three stays idle, or two of three where messages take a tick and chunks wait for each other.
    idle = (2 if job.pipeline.overlap and job.pipeline.num_chunks > 1 else 1) / 3 if splits else 1.0
    ramp = (sum(ranks) - max(ranks)) / job.pipeline.num_chunks * idle
    num_ticks = 3 * job.pipeline.num_chunks * job.num_micro_batches
    messages = 0.0 if job.pipeline.overlap else num_ticks * float(costs.message(job)[0])
    return job.num_micro_batches * max(ranks) + ramp + messages + float(sum(costs.once_a_step(job).values())[0])


def _num_done(job: Job) -> dict[str, float]:
    """Returns how often a pp rank does each operation in a step, on average."""
    if job.pp == 1:  # no schedule is followed: each micro-batch goes forward and backward in turn
        layers = dict.fromkeys(("forward", "backward"), job.num_micro_batches * job.model.num_layers)
        ends = dict.fromkeys(("embed", "embed_backward", "head"), job.num_micro_batches)
        return {"backward_input": 0, "backward_weight": 0, **layers, **ends}
    return {name: float(job.table.column(column).sum()) / job.pp for name, column in COLUMN_OF.items()}
