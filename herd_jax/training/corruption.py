"""Silent data corruption: a device that computes wrongly and says nothing (6 interruptions in 54 days, section 3.3.4 of the paper).

Every `train.verify_every_steps` steps a step is computed twice, by the same program from the same state and batch, and every bit of the two
new states must be the same; so must be the copies that devices hold of the same part of a leaf. FSDP leaves no copies of matrices over
(dp, cp), but embedding and head are copied over pp, norms over all but pp, and counters over all.

It takes the time of a second step, and the memory of a second state: 12 bytes a parameter, sharded as the state is. It finds a step that goes
wrong; it does not find bits of weights that flip in memory between two steps, unless a copy of the weights contradicts them. A program must
repeat itself bit for bit when all is well; on NVIDIA GPUs that takes XLA_FLAGS=--xla_gpu_deterministic_ops=true.

The gradient's sum over devices carries an error from one of them to all. To name it, the gradient is then computed several more times, and
each device's summand compared with its earlier ones: this shows the devices of one dp rank, which pass on each other's errors. Then the run
stops: it exits with 78, after which no supervisor starts it again, since the same devices would go on and later checkpoints may be wrong.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from herd_jax.errors import Miscomputed
from herd_jax.mesh import on_mesh
from herd_jax.parallel.collectives import all_gather
from herd_jax.reliability.timeline import Timeline
from herd_jax.training.checkpoints.checksums import checksum, leaf_types
from herd_jax.training.state import State
from herd_jax.training.step import Steps

NUM_REPETITIONS = 4  # of the gradient, to find the device


class Verification:
    """Verifies the steps of a run that begins after `first_step` steps; `hosts` names the host of each process. `every_steps` 0 verifies none."""

    def __init__(self, every_steps: int, steps: Steps, hosts: list[str], first_step: int, timeline: Timeline) -> None:
        self._every_steps, self._steps, self._hosts, self._timeline = every_steps, steps, hosts, timeline
        self._last_good = first_step
        mesh, specs = steps.layout.mesh, steps.plan.specs
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=steps.plan.shardings)
        self._compare = on_mesh(_compare, mesh, (specs, specs), PartitionSpec(), steps.compute_dtype)

    def run(self, step: int, compute: Callable[[State, dict], tuple[State, dict]], state: State, batch: dict) -> tuple[State, dict]:
        """Runs `compute(state, batch)`, which donates the state, for the step with that number: twice where verification is due.

        Raises Miscomputed, on every process, where the results differ or copies within one do.
        """
        if not self._every_steps or step % self._every_steps:
            return compute(state, batch)
        if self._timeline.activity == "step":  # and not "compile"
            self._timeline.enter("verification")
        first, _ = jax.block_until_ready(compute(self._copy(state), batch))
        self._timeline.enter("step")
        state, metrics = compute(state, batch)
        num_different_DL, sums_DL = (np.asarray(found) for found in self._compare(first, state))
        names = list(leaf_types(state))
        if num_different_DL.any():
            self._stop(step, self._two_results(num_different_DL, names, state, batch))
        for name, spec, sums_D in zip(names, jax.tree.leaves(self._steps.plan.specs), sums_DL.T, strict=True):
            odd = odd_copies(sums_D, spec, self._steps.layout.mesh)
            if odd:
                self._stop(step, f"the copies of {name} are not alike, on {self._name(odd)}")
        self._last_good = step
        return state, metrics

    def _two_results(self, num_different_DL: np.ndarray, names: list[str], state: State, batch: dict) -> str:
        """Returns what differs, and where it comes from."""
        worst = names[num_different_DL.sum(axis=0).argmax()]
        what = f"computed twice it has two results ({num_different_DL.sum():,} elements, most of them in {worst})"
        sums_RDL = np.stack([np.asarray(self._steps.fingerprint(state.params, batch)) for _ in range(NUM_REPETITIONS)])
        unstable = np.flatnonzero((sums_RDL != sums_RDL[0]).any(axis=(0, 2)))
        differing = np.flatnonzero(num_different_DL.any(axis=1))
        if len(unstable):
            return f"{what}, and so has the gradient of {self._name(unstable)} alone"
        if len(differing) < len(num_different_DL):
            return f"{what}, on {self._name(differing)} alone"
        return f"{what}, on all devices; in {NUM_REPETITIONS} repetitions the gradient of each device was the same"

    def _name(self, devices: list[int] | np.ndarray) -> str:
        """Returns the names of devices, given by their places in the mesh, with their processes and hosts."""
        found = [self._steps.layout.mesh.devices.flat[index] for index in devices]
        lines = [f"device {device.id} (process {device.process_index} on {self._hosts[device.process_index]})" for device in found[:8]]
        return ", ".join(lines) + (f" and {len(found) - 8} more" if len(found) > 8 else "")

    def _stop(self, step: int, what: str) -> None:
        raise Miscomputed(
            f"step {step} was computed wrongly: {what}; take the host out, move checkpoints after step {self._last_good} away, and start "
            "again (where healthy GPUs say this, XLA_FLAGS=--xla_gpu_deterministic_ops=true is missing)"
        )


def odd_copies(sums_D: np.ndarray, spec: PartitionSpec, mesh: Mesh) -> list[int]:
    """Returns the devices (in the order of `mesh.devices`) whose part of an array sharded by `spec` has another checksum than most devices with
    the same part; all of these devices, where there is no majority."""
    sharded = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
    copied = [dim for dim, axis in enumerate(mesh.axis_names) if axis not in sharded]
    devices = np.moveaxis(np.arange(mesh.size).reshape(mesh.devices.shape), copied, range(len(copied)))
    devices_CP = devices.reshape(int(np.prod(devices.shape[: len(copied)])), -1)  # copies, parts
    odd = []
    for of_part in devices_CP.T[(sums_D[devices_CP] != sums_D[devices_CP[0]]).any(axis=0)]:
        values, inverse, counts = np.unique(sums_D[of_part], return_inverse=True, return_counts=True)
        majority = counts.argmax() if 2 * counts.max() > len(of_part) else -1
        odd += of_part[inverse != majority].tolist()
    return sorted(odd)


def _compare(first: State, second: State) -> tuple[jax.Array, jax.Array]:
    """Returns, for each device's parts of the leaves, how many elements differ in a bit, and the second's checksum.

    Both are uint32 [devices, leaves].
    """

    def num_different(a, b):
        unsigned = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(a, unsigned) != jax.lax.bitcast_convert_type(b, unsigned), dtype=jnp.uint32)

    different = [num_different(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)]
    sums = [checksum(leaf) for leaf in jax.tree.leaves(second)]
    return tuple(all_gather(jnp.stack(values)[None], ("tp", "cp", "pp", "dp"), 0) for values in (different, sums))
