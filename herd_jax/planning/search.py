"""Which layouts of a model on a number of devices fit, which of them is predicted to be fastest, and why the rest are not listed."""

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Callable, Iterator

from herd_jax.errors import UserError
from herd_jax.machines.hardware import Hardware
from herd_jax.models.config import LlamaConfig
from herd_jax.models.llama import REMAT
from herd_jax.parallel.data import GATHER
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.planning import costs, throughput
from herd_jax.planning.job import Job
from herd_jax.planning.throughput import Throughput

MICRO_BATCH_SIZES = (1, 2, 4)
NEGLIGIBLE_BUBBLE = 0.02  # the number of chunks is not doubled where the bubble is no larger than this
SLACK = 1.02  # how much the approximate time of a step may be above the predicted one

MemoryEstimate = Callable[[Job], dict[str, float]]  # bytes of a device by kind, with "total"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout that fits: the job, its memory (bytes of a device by kind) and throughput."""

    job: Job
    memory: dict[str, float]
    throughput: Throughput


@dataclasses.dataclass
class Rejection:
    """`count` layouts left out for one reason, and as an example the one that came nearest, or first."""

    reason: str
    example: str
    distance: float
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search found: `ranked` by predicted step time, fastest first; `rejections` by reason."""

    ranked: list[Candidate]
    rejections: list[Rejection]


def search(
    model_name: str,
    model: LlamaConfig,
    hardware: Hardware,
    num_devices: int,
    global_batch_tokens: int,
    seq_len: int,
    memory_estimate: MemoryEstimate,
    mean_document_length: float | None = None,
    num_listed: int = 10,
) -> Search:
    """Returns the `num_listed` fastest layouts over (tp, cp, pp, dp), schedule, micro-batch size, remat and gather that fit in memory.

    Layouts are looked at in the order of their approximate time, until none that is left can be among the fastest. Remat,
    which only costs time, is tried where it is needed. Raises UserError where the batch is not whole sequences.
    """
    if num_devices < 1 or seq_len < 1 or num_listed < 1:
        raise UserError(f"gpus {num_devices}, seq_len {seq_len} and the number of layouts to list {num_listed} must each be 1 or more")
    if global_batch_tokens < 1 or global_batch_tokens % seq_len:
        raise UserError(
            f"global_batch_tokens {global_batch_tokens} is not a whole number of sequences of seq_len {seq_len}: choose a multiple of it"
        )
    found = _Found(num_listed, memory_estimate)
    base = functools.partial(Job, model_name, model, hardware, seq_len=seq_len, mean_document_length=mean_document_length)
    for layout in _layouts(num_devices):
        for job in _jobs(base, layout, global_batch_tokens // seq_len, found.reject):
            found.push(job)
    found.run()
    return Search([candidate for _, _, candidate in sorted(found.ranked, reverse=True)], list(found.rejections.values()))


class _Found:
    """The layouts still to be looked at, by their approximate time, and what was found of the others."""

    def __init__(self, num_listed: int, memory_estimate: MemoryEstimate):
        self.num_listed, self.memory_estimate = num_listed, memory_estimate
        self.queue: list[tuple[float, int, Job]] = []
        self.ranked: list[tuple[float, int, Candidate]] = []  # a heap of the fastest, the slowest of them first
        self.rejections: dict[str, Rejection] = {}
        self.order = itertools.count()

    def push(self, job: Job) -> None:
        heapq.heappush(self.queue, (throughput.approximate(job), next(self.order), job))

    def reject(self, reason: str, example: str, count: int = 1, distance: float = 0.0) -> None:
        rejection = self.rejections.setdefault(reason, Rejection(reason, example, distance))
        rejection.count += count
        if distance < rejection.distance:
            rejection.example, rejection.distance = example, distance

    def run(self) -> None:
        while self.queue:
            least, _, job = heapq.heappop(self.queue)
            if len(self.ranked) == self.num_listed and least >= -SLACK * self.ranked[0][0]:
                example = f"{describe(job)}: about {least:.3g} s a step"
                self.reject("slower than those listed, whether they fit or not", example, 1 + len(self.queue))
                return
            total, memory = costs.least_memory(job), None
            if total <= job.hardware.memory_bytes:
                memory = self.memory_estimate(job)
                total = memory["total"]
            if total > job.hardware.memory_bytes:
                over = (total - job.hardware.memory_bytes) / 1e9
                example = f"{describe(job)}: {over:.1f} GB too much" + (" or more" if memory is None else "")
                self.reject("do not fit in memory", example, distance=over)
                if job.remat != REMAT[-1]:
                    self.push(dataclasses.replace(job, remat=REMAT[REMAT.index(job.remat) + 1]))
                continue
            candidate = Candidate(job, memory, throughput.estimate(job))
            heapq.heappush(self.ranked, (-candidate.throughput.step_time_s, -next(self.order), candidate))
            if len(self.ranked) > self.num_listed:
                _, _, slowest = heapq.heappop(self.ranked)
                step = slowest.throughput.step_time_s
                self.reject("fit, but are slower than those listed", f"{describe(slowest.job)}: {step:.3g} s a step", distance=step)


def describe(job: Job) -> str:
    """Returns the layout as one line."""
    mesh = f"tp {job.tp}, cp {job.cp}, pp {job.pp}, dp {job.dp}"
    overlap = " with overlap" if job.pipeline.overlap else ""
    pipeline = f", {job.pipeline.schedule} x {job.pipeline.num_chunks}{overlap}" if job.pp > 1 else ""
    return f"{mesh}{pipeline}, micro-batch {job.micro_batch_size}, remat {job.remat}, gather {job.gather}"


def _layouts(num_devices: int) -> Iterator[dict[str, int]]:
    """Yields all (tp, cp, pp, dp) whose product is `num_devices`."""
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for tp, cp, pp in itertools.product(divisors, repeat=3):
        if num_devices % (tp * cp * pp) == 0:
            yield {"tp": tp, "cp": cp, "pp": pp, "dp": num_devices // (tp * cp * pp)}


def _jobs(base, layout: dict[str, int], num_sequences: int, reject) -> Iterator[Job]:
    """Yields the possible jobs of a layout, without remat."""
    model, hardware = base.args[1:3]
    name = ", ".join(f"{axis} {size}" for axis, size in layout.items())
    if layout["tp"] > hardware.devices_per_node:
        return reject("tp would leave the node, where it is too slow", f"{name}: a node has {hardware.devices_per_node} devices")
    if layout["pp"] > model.num_layers + 2:
        return reject("more pipeline ranks than layers", f"{name}: {model.num_layers} layers, and 2 for the embedding and the head")
    if num_sequences % layout["dp"]:
        return reject("the batch does not divide by dp", f"{name}: {num_sequences} sequences a step")
    batch = num_sequences // layout["dp"]
    try:
        job = base(**layout, batch_per_dp=batch)
    except UserError as error:
        return reject("the model or the sequence does not divide", f"{name}: {error}")
    # Where a cp group spans nodes, half the cp and half the micro-batch give a device the same work and FSDP the same rings, and send less.
    halved = layout["cp"] % 2 == 0 and layout["tp"] * layout["cp"] > hardware.devices_per_node
    for micro_batch_size in MICRO_BATCH_SIZES:
        if batch % micro_batch_size == 0 and not (halved and micro_batch_size % 2 == 0):
            for pipeline in _pipelines(layout["pp"], batch // micro_batch_size, model.num_layers):
                for gather in GATHER:
                    yield dataclasses.replace(job, micro_batch_size=micro_batch_size, pipeline=pipeline, gather=gather)


def _pipelines(num_ranks: int, num_micro_batches: int, num_layers: int) -> Iterator[PipelineConfig]:
    """Yields the schedules worth trying: chunks in powers of 2, as long as there are layers for them and the bubble is not negligible."""
    if num_ranks == 1:
        yield PipelineConfig()
        return
    num_chunks = 1
    while True:
        for schedule in ("1f1b" if num_chunks == 1 else "interleaved", "zero_bubble"):
            for overlap in (False, True):
                yield PipelineConfig(schedule, num_chunks, overlap=overlap)
        bubble = (num_ranks - 1) / (num_chunks * num_micro_batches)
        num_chunks *= 2
        if bubble <= NEGLIGIBLE_BUBBLE or num_ranks * num_chunks > num_layers + 2:
            return
