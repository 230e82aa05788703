"""The one place where the tests' devices are set: eight fake CPU devices, before jax starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # shapes are tiny: compiling is what costs
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_collective_call_terminate_timeout_seconds=200",  # on a busy machine a device may wait longer than 40 s for the others
    )
)
