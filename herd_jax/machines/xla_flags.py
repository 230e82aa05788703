"""XLA's flags for GPUs: one table by hardware, each flag with what it is for, and how they reach XLA.

Flags come and go with versions of XLA, and XLA aborts the process that names one it does not know. So each is tried first in a process
that does nothing else (a quarter of a second), and one that is not known there is reported and left out. What XLA_FLAGS and the
environment already say stays as it is. What they do to our steps was seen in programs compiled for an H100 (`benchmarks/compile_for_gpu.py`); none
was measured on a card.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag: `name` is one of XLA_FLAGS, or an environment variable where it is in capitals; `purpose` is what it is for; `before`: versions of jax
    from this one on do without it."""

    name: str
    value: str
    purpose: str
    before: str = ""


_EVERY_GPU = (
    Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "messages start early and end late, beside matmuls"),
    Flag("xla_disable_hlo_passes", "rematerialization", "what the backward recomputes is train.remat's choice: the pass adds matmuls and saves nothing"),
    Flag("xla_gpu_enable_triton_gemm", "false", "matmuls by cuBLAS: fast on the large shapes of a Llama, and no search for Triton tiles"),
    Flag("xla_gpu_enable_dynamic_slice_fusion", "false", "else a matmul whose result is stored runs twice, once for the store", before="0.12"),
    Flag("xla_gpu_dot_merger_threshold_mb", "0", "the parts of a product that run beside messages stay parts (parallel/ring.py)"),
    Flag("xla_gpu_experimental_parallel_collective_overlap_limit", "2", "both messages of a pipeline's tick travel at a time"),
    Flag("xla_gpu_enable_while_loop_double_buffering", "true", "no copies in the loop over ticks"),
    Flag("xla_gpu_all_reduce_combine_threshold_bytes", str(_GIB // 4), "the same for the embedding's gradient over pp"),
    Flag("NCCL_NVLS_ENABLE", "0", "leaves to the model the GPU memory that NCCL's NVLink multicast buffers take"),
)
HARDWARE_FLAGS = {
    "A100": (*_EVERY_GPU, Flag("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.90", "of 80 GB: the rest is for NCCL and cuBLAS")),
    "H100": (*_EVERY_GPU, Flag("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92", "of 80 GB: the rest is for NCCL and cuBLAS")),
    "H200": (*_EVERY_GPU, Flag("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94", "of 141 GB: the rest is for NCCL and cuBLAS")),
    "B200": (*_EVERY_GPU, Flag("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94", "of 180 GB: the rest is for NCCL and cuBLAS")),
    "NVIDIA": _EVERY_GPU,  # any other
}


def apply_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what the table has for this host's GPU, if there is one and JAX may use it. Call before jax is first used."""
    if environment.get("JAX_PLATFORMS", "cuda").startswith(("cuda", "gpu")):
        gpu = find_gpu()
        if gpu:
            set_flags(choose_flags(gpu), environment)


def find_gpu() -> str | None:
    """Returns the model of the first NVIDIA GPU of this host, such as "NVIDIA H100 80GB HBM3", from its driver and not through JAX."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        return re.search(r"Model:\s*(.*)", path.read_text())[1]
    return None


def choose_flags(gpu: str) -> tuple[Flag, ...]:
    """Returns the flags for a GPU of that name and the installed jax."""
    numbers = lambda version: [int(part) for part in re.findall(r"\d+", version)[:2]]
    found = next((flags for name, flags in HARDWARE_FLAGS.items() if name in gpu), _EVERY_GPU)
    return tuple(flag for flag in found if not flag.before or numbers(metadata.version("jax")) < numbers(flag.before))


def set_flags(flags: tuple[Flag, ...], environment: MutableMapping[str, str]) -> None:
    """Puts into `environment` what it does not set yet and this XLA knows; a line on stderr names what it does not know."""
    own = environment.get("XLA_FLAGS", "")
    wanted = []
    for flag in flags:
        if flag.name.isupper():
            environment.setdefault(flag.name, flag.value)
        elif not re.search(rf"--{flag.name}(=|\s|$)", own):
            wanted.append(f"--{flag.name}={flag.value}")
    unknown = unknown_flags(wanted)
    if unknown:
        print(f"warning: this version of XLA does not know {', '.join(unknown)}: left out", file=sys.stderr)
    environment["XLA_FLAGS"] = " ".join([*(flag for flag in wanted if flag not in unknown), *own.split()])


def unknown_flags(flags: list[str]) -> list[str]:
    """Returns those of `flags` ("--NAME=VALUE") that the installed XLA does not know; all of them, where that cannot be found out."""
    unknown: list[str] = []
    program = "from jaxlib import xla_client; xla_client.make_cpu_client()"  # XLA reads its flags; the GPUs are not touched
    while True:
        known = [flag for flag in flags if flag not in unknown]
        environment = {**os.environ, "XLA_FLAGS": " ".join(known)}
        tried = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        named = [flag for flag in known if re.search(rf"Unknown flags? in XLA_FLAGS:.*{re.escape(flag)}(\s|$)", tried.stderr)]
        if not named:
            return flags if tried.returncode else unknown
        unknown += named
