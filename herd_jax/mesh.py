"""The device mesh: four axes, innermost first, and how many devices each takes (section 3.3.2 of the paper).

rank = tp + TP * (cp + CP * (pp + PP * dp)): neighbours in tp sit on one host, dp spans the cluster.
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from herd_jax.errors import UserError

AXES = ("tp", "cp", "pp", "dp")
FSDP_AXES = ("dp", "cp")  # weights, gradients and optimizer state are sharded over both together


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; `dp` 0 takes whatever devices are left."""

    tp: int = 1  # tensor parallelism: devices that share each matrix and the sequence between blocks
    cp: int = 1  # context parallelism: devices that share each sequence
    pp: int = 1  # pipeline parallelism: devices that share the layers
    dp: int = 0  # data parallelism (FSDP): devices that share the batch; 0: all that are left
    allow_tp_across_hosts: bool = False  # for hosts that are linked as fast as the devices in them

    def __post_init__(self):
        for axis in ("tp", "cp", "pp"):
            if getattr(self, axis) < 1:
                raise UserError(f"mesh.{axis} is {getattr(self, axis)}: it must be 1 or more")
        if self.dp < 0:
            raise UserError(f"mesh.dp is {self.dp}: it must be 1 or more, or 0 for whatever devices are left")


def request_cpu_devices(config: MeshConfig, num_processes: int = 1) -> None:
    """Makes the CPU, where it is the platform, show this process's share of the (fake) devices that the mesh needs.

    Call before jax is first used. Other platforms are not touched, and neither is a number that XLA_FLAGS or JAX_NUM_CPU_DEVICES already
    sets. Raises UserError where the processes cannot share the mesh equally.
    """
    inner = config.tp * config.cp * config.pp
    num_devices = inner * config.dp if config.dp else math.lcm(inner, num_processes)
    if num_devices % num_processes:
        raise UserError(
            f"{num_processes} processes cannot share the {num_devices} devices of mesh tp {config.tp} x cp {config.cp} x pp {config.pp} "
            f"x dp {config.dp} equally: change the number of processes, or mesh.dp"
        )
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
    if not chosen:
        jax.config.update("jax_num_cpu_devices", num_devices // num_processes)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (those of all processes by default), with axes ("tp", "cp", "pp", "dp") in the paper's rank order.

    Raises UserError if the axes do not use every device exactly once, or if tp leaves a host without `allow_tp_across_hosts`.
    """
    grid = arrange(config, jax.devices() if devices is None else devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(config: MeshConfig, devices: list[jax.Device]) -> np.ndarray:
    """Returns the devices as [tp, cp, pp, dp]. Those of a process are neighbours: tp, which sends most, stays on a host, and dp, which can
    wait longest, spans them. A process counts as a host. Raises UserError as `make_mesh` does."""
    inner = config.tp * config.cp * config.pp
    dp = config.dp or len(devices) // inner
    if inner * dp != len(devices) or dp == 0:
        asked = f"tp {config.tp} x cp {config.cp} x pp {config.pp}" + (f" x dp {config.dp}" if config.dp else "")
        raise UserError(
            f"mesh {asked} takes {inner * config.dp if config.dp else f'a multiple of {inner}'} devices and there are "
            f"{len(devices)}: change mesh.tp, mesh.cp, mesh.pp or mesh.dp so that their product is {len(devices)}"
        )
    devices = sorted(devices, key=lambda device: device.process_index)
    hosts = np.array([device.process_index for device in devices]).reshape(-1, config.tp)
    if not config.allow_tp_across_hosts and (hosts != hosts[:, :1]).any():
        in_host = int(np.bincount(hosts.ravel()).max())
        raise UserError(
            f"mesh.tp {config.tp} does not fit into the hosts, of {in_host} devices each: set mesh.tp to a divisor of {in_host} "
            "and mesh.pp or mesh.dp higher, or mesh.allow_tp_across_hosts=true where hosts are linked as fast as the devices in them"
        )
    return np.array(devices).reshape(dp, config.pp, config.cp, config.tp).transpose(3, 2, 1, 0)


def on_mesh(function, mesh: Mesh, in_specs, out_specs, compute_dtype, **options):
    """Returns `function`, which says what one device does, jitted over the whole mesh with every axis manual; `options` go to `jax.jit`."""
    if compute_dtype == jnp.float32:  # not TF32, where a GPU would take it
        function = jax.default_matmul_precision("highest")(function)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False), **options)


def to_host(array: jax.Array) -> np.ndarray:
    """Returns the whole of an array. All processes that hold a part of it make this call."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def fsdp_size(mesh: Mesh) -> int:
    """Returns over how many devices FSDP shards each weight."""
    return math.prod(mesh.shape[axis] for axis in FSDP_AXES)
