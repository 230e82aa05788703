"""The device mesh: four axes, innermost first, and how many devices each takes (section 3.3.2 of the paper).

rank = tp + TP * (cp + CP * (pp + PP * dp)): neighbours in tp sit on one host, dp spans the cluster.
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from herd_jax.errors import UserError

AXES = ("tp", "cp", "pp", "dp")
FSDP_AXES = ("dp", "cp")  # weights, gradients and optimizer state are sharded over both together


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; `dp` 0 takes whatever devices are left."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 0

    def __post_init__(self):
        for axis in ("tp", "cp", "pp"):
            if getattr(self, axis) < 1:
                raise UserError(f"mesh.{axis} is {getattr(self, axis)}: it must be 1 or more")
        if self.dp < 0:
            raise UserError(f"mesh.dp is {self.dp}: it must be 1 or more, or 0 for whatever devices are left")


def request_cpu_devices(config: MeshConfig) -> None:
    """Makes the CPU, where it is the platform, show as many (fake) devices as the mesh needs. Call before jax is first used.

    Other platforms are not touched, and neither is a number that XLA_FLAGS or JAX_NUM_CPU_DEVICES already sets.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ
    if not chosen:
        jax.config.update("jax_num_cpu_devices", config.tp * config.cp * config.pp * max(config.dp, 1))


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all by default), with axes ("tp", "cp", "pp", "dp") in the paper's rank order.

    Raises UserError if the axes do not use every device exactly once.
    """
    devices = jax.devices() if devices is None else devices
    inner = config.tp * config.cp * config.pp
    dp = config.dp or len(devices) // inner
    if inner * dp != len(devices) or dp == 0:
        asked = f"tp {config.tp} x cp {config.cp} x pp {config.pp}" + (f" x dp {config.dp}" if config.dp else "")
        raise UserError(
            f"mesh {asked} takes {inner * config.dp if config.dp else f'a multiple of {inner}'} devices and there are "
            f"{len(devices)}: change mesh.tp, mesh.cp, mesh.pp or mesh.dp so that their product is {len(devices)}"
        )
    grid = np.array(devices).reshape(dp, config.pp, config.cp, config.tp)
    return Mesh(grid.transpose(3, 2, 1, 0), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def on_mesh(function, mesh: Mesh, in_specs, out_specs, compute_dtype, **options):
    """`function`, which says what one device does, jitted over the whole mesh with every axis manual; `options` go to `jax.jit`."""
    if compute_dtype == jnp.float32:  # not TF32, where a GPU would take it
        function = jax.default_matmul_precision("highest")(function)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False), **options)


def fsdp_size(mesh: Mesh) -> int:
    """Over how many devices each weight is sharded by FSDP."""
    return math.prod(mesh.shape[axis] for axis in FSDP_AXES)
