"""What the processes of a run tell each other at every step: whether a signal asks them to stop, and how long their own work took.

The numbers go round in an all-gather of their own on the devices, a few bytes that are queued just before the step and read when the step
before it has finished. So each process sees the same numbers at the same step and all stop there, and neither a server nor a file is asked.
(JAX's own preemption sync point knows SIGTERM only, and asks the coordinator at every step.)

A step of the devices ends for all at once: a device that computes slowly shows in no process's own times. What shows is a process that
is slow to read its batch, to do its own work between steps, or to hand over a checkpoint. For devices there is the pre-flight.
"""

import contextlib
import dataclasses
import signal
import socket
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

OWN_TIMES = ("input", "own work", "checkpoint")
_INTERRUPT, _START_AGAIN = 1, 2  # the higher one wins
_SIGNALS = {signal.SIGINT: _INTERRUPT, signal.SIGTERM: _START_AGAIN, signal.SIGUSR1: _START_AGAIN}
_NAME_BYTES = 64


class Signals:
    """Notes SIGINT (Ctrl-C), SIGTERM and SIGUSR1 instead of dying of them in the middle of a step, which could strike after the step has
    taken the state and before it has given it back.

    A second Ctrl-C raises KeyboardInterrupt; a repeated SIGTERM or SIGUSR1, which schedulers send to everyone at once, changes nothing.
    """

    def __init__(self) -> None:
        self.seen = 0

    @contextlib.contextmanager
    def noted(self) -> Iterator["Signals"]:
        """Takes the signals' handlers over (after `jax.distributed.initialize`, which installs one) and gives them back in the end."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number, frame) -> None:
        if number == signal.SIGINT and self.seen:
            raise KeyboardInterrupt
        self.seen = max(self.seen, _SIGNALS[number])


@dataclasses.dataclass(frozen=True)
class Beat:
    """What the processes said at one step: `stop` is the highest of the signals seen; own_times_PT in seconds, T as OWN_TIMES."""

    stop: int
    own_times_PT: np.ndarray

    @property
    def start_again(self) -> bool:
        """Told by a scheduler, not by a person."""
        return self.stop == _START_AGAIN


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
    """Of every process, in order."""
    if jax.process_count() == 1:
        return [socket.gethostname()]
    name = socket.gethostname().encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
    names = multihost_utils.process_allgather(np.frombuffer(name, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in names]


class Stragglers:
    """Ranks processes by their own times and names those that stay slow: slower than the median by `_SHARE` of a step in `_TIMES` logged
    intervals in a row."""

    _SHARE, _TIMES = 0.1, 3

    def __init__(self, hosts: list[str]) -> None:
        self._hosts = hosts
        self._sum_PT = np.zeros((len(hosts), len(OWN_TIMES)))
        self._num_beats = 0
        self._in_a_row = np.zeros(len(hosts), int)

    def add(self, beat: Beat) -> None:
        self._sum_PT += beat.own_times_PT
        self._num_beats += 1

    def report(self, step_seconds: float) -> list[str]:
        """Ends an interval of steps that took `step_seconds` each; a line for each process that stays slow, the slowest first."""
        mean_PT = self._sum_PT / max(self._num_beats, 1)
        median_T = np.median(mean_PT, axis=0)
        late_P = mean_PT.sum(axis=1) - np.median(mean_PT.sum(axis=1))
        self._in_a_row = np.where(late_P > self._SHARE * step_seconds, self._in_a_row + 1, 0)
        self._sum_PT[:], self._num_beats = 0, 0
        lines = []
        for process in np.argsort(-late_P, kind="stable"):
            if self._in_a_row[process] and self._in_a_row[process] % self._TIMES == 0:
                worst = int(np.argmax(mean_PT[process] - median_T))
                lines.append(
                    f"process {process} on {self._hosts[process]} stays slow: {late_P[process]:.3f} s a step more than the median process, "
                    f"most of it {OWN_TIMES[worst]} ({mean_PT[process, worst]:.3f} s, median {median_T[worst]:.3f} s)"
                )
        return lines
