"""The one place where the tests' devices are set: eight fake CPU devices, before jax starts."""

import importlib.metadata
import os

EARLIER = importlib.metadata.version("jaxlib").startswith("0.10.")  # later ones do not know the flag, and end
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # shapes are tiny: compiling is what costs
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",  # the tests themselves are parallel
        *(("--xla_cpu_use_fusion_emitters=false",) if EARLIER else ()),  # they take half of the time of compiling
        "--xla_cpu_collective_call_terminate_timeout_seconds=200",  # on a busy machine a device may wait longer than 40 s for the others
    )
)

import gc  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

MOST_MAPPINGS = 25_000  # of 65,530 that Linux gives a process: a compiled program takes some ten of them, and without any more the process dies


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Forgets compiled programs between two modules where there are very many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
