"""The planner against runs that others have published: what they measured, and what is predicted for their model, devices and layout.

Nothing is fitted to them; the constants of `costs.py` come from the three rows of the paper's Table 4. MFU is counted as here throughout: of
the model's own FLOPs, attention by the keys that the causal mask lets a query see (many sources count all keys, and state a higher one).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from herd_jax.machines.hardware import look_up
from herd_jax.models.config import MODELS, LlamaConfig
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.planning import throughput
from herd_jax.planning.job import Job

POINTS = 5.0  # of MFU by which a prediction may differ before it is a miss
_DGXC = "NVIDIA dgxc-benchmarking, llama3.1/README_{}.md, NeMo 24.09, DGX H100, BF16"
_TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
_LLAMA2_70B = dataclasses.replace(MODELS["llama3-70b"], vocab_size=32_000, rope_scaling=None)

_LESS_POWER = "the H100s are of 96 GB with HBM2e at 2.4 TB/s and 500 W: their clock falls where 700 W would hold it"
_TPU = "the constants are those of matmuls on an H100 within its 700 W, and a TPU's matrix unit reaches more of its peak"


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """A run as its source describes it: a step's `seconds`, or else `tokens_per_second` of a device; `why` explains a miss."""

    name: str
    source: str
    model: LlamaConfig
    hardware: str
    num_devices: int
    layout: dict[str, Any]  # fields of Job
    seconds: float | None = None
    tokens_per_second: float | None = None
    why: str = ""

    @property
    def job(self) -> Job:
        return Job(self.name, self.model, look_up(self.hardware, self.num_devices), **self.layout)


def _nemo(size: str, num_devices: int, mesh: tuple[int, int, int, int], batch_per_dp: int, num_chunks: int, seconds: float) -> PublishedRun:
    """Returns a run of NeMo, whose pipeline ranks send while they compute."""
    pipeline = PipelineConfig("interleaved", num_chunks, overlap=True) if mesh[2] > 1 else PipelineConfig()
    layout = dict(zip(("tp", "cp", "pp", "dp"), mesh)) | {"batch_per_dp": batch_per_dp, "pipeline": pipeline}
    name = f"Llama 3.1 {size.upper()}, NeMo, {num_devices:,} x H100"
    return PublishedRun(name, _DGXC.format(size), MODELS[f"llama3-{size}"], "h100", num_devices, layout, seconds=seconds)


def _paper(num_devices: int, mesh: tuple[int, int, int, int], seq_len: int, batch_per_dp: int, tflops: float) -> PublishedRun:
    pipeline = PipelineConfig("interleaved", 8)
    layout = dict(zip(("tp", "cp", "pp", "dp"), mesh)) | {"batch_per_dp": batch_per_dp, "pipeline": pipeline, "seq_len": seq_len}
    name, model = f"Llama 3 405B, the paper, {num_devices:,} x H100, {seq_len:,} tokens", MODELS["llama3-405b"]
    per_token = model.flops_per_token((seq_len + 1) / 2)
    return PublishedRun(name, "Table 4 of the paper", model, "h100", num_devices, layout, tokens_per_second=tflops * 1e12 / per_token)


_FSDP = {"micro_batch_size": 2, "gather": "layer"}
RUNS = (
    _paper(8192, (8, 1, 16, 64), 8192, 32, 430),
    _paper(16_384, (8, 1, 16, 128), 8192, 16, 400),
    _paper(16_384, (8, 16, 16, 8), 131_072, 16, 380),
    _nemo("8b", 8, (1, 2, 1, 4), 32, 1, 12.91),
    _nemo("8b", 128, (1, 2, 1, 64), 32, 1, 13.10),
    _nemo("70b", 64, (4, 2, 4, 2), 64, 5, 14.72),
    _nemo("70b", 2048, (4, 2, 4, 64), 64, 5, 14.98),
    _nemo("405b", 576, (8, 2, 9, 4), 63, 7, 17.20),
    _nemo("405b", 2304, (8, 2, 9, 16), 63, 7, 17.62),
    PublishedRun(  # whole layers computed again, as they have to be for the memory of an H100
        "Llama 2 70B, MaxText, 64 x H100", "NVIDIA dgxc-benchmarking, maxtext/README_70b.md, BF16", _LLAMA2_70B, "h100", 64,
        {"dp": 64, "batch_per_dp": 2, "seq_len": 4096, "remat": "layer", **_FSDP}, seconds=6.999,
    ),
    PublishedRun(
        "Llama 2 70B, MaxText, 256 x H100", "NVIDIA dgxc-benchmarking, maxtext/README_70b.md, BF16", _LLAMA2_70B, "h100", 256,
        {"dp": 256, "batch_per_dp": 2, "seq_len": 4096, "remat": "layer", **_FSDP}, seconds=7.153,
    ),
    PublishedRun(
        "Llama 3.1 8B, torchtitan, 8 x H100 of 500 W", f"{_TITAN}, Table 1, FSDP + torch.compile", MODELS["llama3-8b"], "h100", 8,
        {"dp": 8, "batch_per_dp": 2, "remat": "attention", **_FSDP}, tokens_per_second=6667, why=_LESS_POWER,
    ),
    PublishedRun(
        "Llama 3.1 8B, torchtitan, 128 x H100 of 500 W", f"{_TITAN}, Table 3, FSDP + torch.compile", MODELS["llama3-8b"], "h100", 128,
        {"dp": 128, "batch_per_dp": 2, "remat": "attention", **_FSDP}, tokens_per_second=6514, why=_LESS_POWER,
    ),
    PublishedRun(  # its layout is not in the text: FSDP alone, whole layers computed again
        "Llama 3.1 405B, MaxText, 512 x TPU v5p", "AI-Hypercomputer tpu-recipes, training/v5p/Llama3.1-405B-MaxText", MODELS["llama3-405b"],
        "tpu-v5p", 512, {"dp": 512, "batch_per_dp": 2, "remat": "layer", **_FSDP}, tokens_per_second=124.618, why=_TPU,
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A published run and the prediction: tokens/s of a device, and MFU."""

    run: PublishedRun
    measured: float
    predicted: float
    measured_mfu: float
    predicted_mfu: float

    @property
    def points(self) -> float:
        """Returns by how many points of MFU the prediction is above what was measured."""
        return 100 * (self.predicted_mfu - self.measured_mfu)

    @property
    def is_miss(self) -> bool:
        return abs(self.points) > POINTS


def compare(run: PublishedRun) -> Comparison:
    job = run.job
    speed = throughput.estimate(job)
    measured = run.tokens_per_second or job.tokens_per_step / run.seconds / run.num_devices
    mfu = measured * speed.flops_per_token / job.hardware.peak_flops
    return Comparison(run, measured, speed.tokens_per_second / run.num_devices, mfu, speed.mfu)


def lines(found: Sequence[Comparison]) -> list[str]:
    """Returns the table as text, with the sources and the reasons of the misses below it."""
    width = max(len(each.run.name) for each in found)
    rows = [f"{'':<{width}}  {'measured':>22}  {'predicted':>22}  {'points':>6}"]
    for number, each in enumerate(found, start=1):
        measured, predicted = (
            f"{tokens:>9,.0f} tok/s {mfu:>6.1%}" for tokens, mfu in ((each.measured, each.measured_mfu), (each.predicted, each.predicted_mfu))
        )
        rows.append(f"{each.run.name:<{width}}  {measured:>22}  {predicted:>22}  {each.points:>+6.1f} [{number}]{' miss' if each.is_miss else ''}")
    num_good = sum(not each.is_miss for each in found)
    rows += ["", f"{num_good} of {len(found)} within {POINTS:g} points of MFU; tokens/s are a device's", ""]
    for number, each in enumerate(found, start=1):
        rows.append(f"[{number}] {each.run.source}" + (f": {each.run.why}" if each.is_miss else ""))
    return rows


def to_dicts(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    names = ("measured", "predicted", "measured_mfu", "predicted_mfu", "points", "is_miss")
    return [{"name": each.run.name, "source": each.run.source, **{name: getattr(each, name) for name in names}} for each in found]
