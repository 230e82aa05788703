"""GPUs as XLA describes them, so that a program can be compiled for one where none is: data sheets in the form of GpuTargetConfigProto.

Numbers are those of NVIDIA's data sheets and of a device query: cores, clocks, shared memory, caches. XLA's choices follow from them; none is
a measurement.
"""

import dataclasses

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class DataSheet:
    """One GPU. `matrix_clock` is that at which the data sheet's dense rate is reached; a core does `matrix_rate` BF16 products a clock, 4 times."""

    name: str
    capability: tuple[int, int]
    cores: int
    memory_bytes: int
    memory_bandwidth: float
    l2_bytes: int
    clock: float  # GHz
    matrix_clock: float  # GHz
    matrix_rate: int


DATA_SHEETS = {
    "h100": DataSheet("NVIDIA H100 80GB HBM3", (9, 0), 132, 84942979072, 3.35232e12, 52428800, 1.98, 1.8295201, 512),
    "h200": DataSheet("NVIDIA H200", (9, 0), 132, 150_754_820_096, 4.8e12, 62914560, 1.98, 1.8295201, 512),
    "b200": DataSheet("NVIDIA B200", (10, 0), 148, 191_503_138_816, 7.7e12, 132644864, 1.965, 1.855, 1024),
}
_RUNTIME, _DRIVER, _CUDNN = "12.8.0", "13.0.0", (9, 10, 0)
_DOUBLE, _EIGHT_BITS, _FLOAT, _HALF = (12,), (2, 6, 19, 20, 23, 24, 25, 28, 29, 33, 35, 36), (11,), (10, 16)  # numbers of XLA's primitive types


def devices(name: str, count: int) -> list[jax.Device]:
    """Returns `count` devices of one host, for which programs can be lowered and compiled, but not run."""
    return list(topologies.get_topology_desc(platform="cuda", target_config=_target(DATA_SHEETS[name]), topology=f"1x1x{count}").devices)


def _target(gpu: DataSheet) -> str:
    def rate(kind: int, clock: float, units: int, products: int) -> str:
        return f"rate_infos {{ key: {kind} value {{ clock_rate_ghz: {clock} units_per_core: {units} ops_per_clock: {products} }} }}"

    scalar = [(4, 64, 1), (8, 64, 1), (10, 128, 2), (11, 128, 1), (12, 64, 1), (16, 128, 2)]
    matrix = [(kind, 2 * gpu.matrix_rate) for kind in _EIGHT_BITS] + [(kind, gpu.matrix_rate) for kind in _HALF]
    matrix += [(kind, gpu.matrix_rate // 2) for kind in _FLOAT] + [(kind, gpu.matrix_rate // 16) for kind in _DOUBLE]
    major, minor = gpu.capability
    cudnn = "major: {} minor: {} patch: {}".format(*_CUDNN)
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
          shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(gpu.memory_bandwidth)} l2_cache_size: {gpu.l2_bytes} clock_rate_ghz: {gpu.clock}
          device_memory_size: {gpu.memory_bytes} device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
          cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
          scalar_unit_description {{ {" ".join(rate(kind, gpu.clock, units, products) for kind, units, products in scalar)} }}
          matrix_unit_description {{ {" ".join(rate(kind, gpu.matrix_clock, 4, products) for kind, products in matrix)} }}
          device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {major}.{minor}a" name: "{gpu.name}"
          driver_version: "{_DRIVER}" runtime_version: "{_RUNTIME}" compile_time_toolkit_version: "{_RUNTIME}"
          dnn_version: "{".".join(map(str, _CUDNN))}" device_interconnect_info {{ active_links: 18 }}
        }}
        platform_name: "CUDA" dnn_version_info {{ {cudnn} }} device_description_str: "{gpu.name}"
    """
