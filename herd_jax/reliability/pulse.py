"""What the processes of a run tell each other at every step: whether a signal asks them to stop, and how long their own work took.

The numbers go round in an all-gather of their own on the devices, a few bytes that are queued just before the step and read when the step
before it has finished. So each process sees the same numbers at the same step and all stop there, and neither a server nor a file is asked.
(JAX's own preemption sync point knows SIGTERM only, and asks the coordinator at every step.)

A step of the devices ends for all at once: a device that computes slowly shows in no process's own times. What shows is a process that
is slow to read its batch, to do its own work between steps, or to hand over a checkpoint. For devices there is the pre-flight.
"""

import dataclasses
import socket

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from herd_jax.machines.agreement import tell_all
from herd_jax.reliability.signals import START_AGAIN

OWN_TIMES = ("input", "own work", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Beat:
    """What the processes said at one step: `stop` is the highest of the signals seen; own_times_PT in seconds, T as OWN_TIMES."""

    stop: int
    own_times_PT: np.ndarray

    @property
    def start_again(self) -> bool:
        """Tells whether a scheduler, not a person, told the run to stop."""
        return self.stop == START_AGAIN


class Pulse:
    """Sends and reads beats; every process makes the same calls."""

    def __init__(self, mesh: Mesh) -> None:
        processes = [device.process_index for device in mesh.devices.flat]
        self._rows = [processes.index(process) for process in sorted(set(processes))]  # each process's first device
        self._shape = (len(processes), 1 + len(OWN_TIMES))
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._gather = jax.jit(lambda values: values, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def send(self, seen: int, own_times: list[float]) -> jax.Array | np.ndarray:
        """Queues this process's numbers."""
        values = np.array([[seen, *own_times]], np.float32)
        if len(self._rows) == 1:
            return values
        return self._gather(jax.make_array_from_callback(self._shape, self._sharding, lambda index: values))

    def read(self, sent: jax.Array | np.ndarray) -> Beat:
        """Waits until every process has sent its own."""
        values = np.asarray(sent)
        values = values[self._rows] if len(values) > 1 else values
        return Beat(int(values[:, 0].max()), values[:, 1:])


def host_names() -> list[str]:
    """Returns the name of every process's host, in order."""
    return tell_all(socket.gethostname())
