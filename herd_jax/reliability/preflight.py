"""The check of all hosts before a run: a table with a row a process, and the names of those that differ from the others.

That code, versions and config are everywhere the same is checked at every start, by the roll call (`herd_jax.machines.roll_call`).
"""

import contextlib
import dataclasses
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from herd_jax.errors import HUNG, UserError
from herd_jax.files import user_path
from herd_jax.machines.agreement import tell_all
from herd_jax.mesh import AXES, MeshConfig, make_mesh, on_mesh

_SHARE = 0.9  # of the median, below which a rate or a memory is an outlier
_MOST_SKEW = 1.0  # seconds between clocks: more makes logs of several hosts hard to read together
_LIMIT_SECONDS = 300  # for each check
_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Row:
    """What one process found on its host. Memory in GB (of the device with least), matmul in TFLOP/s (of the slowest device), all-reduce in
    GB/s (bus bandwidth: 2 (n - 1) / n x bytes / time, by axis of more than one device), clock in seconds ahead of process 0."""

    process: int
    host: str
    devices: str
    memory: float
    matmul: float
    all_reduce: dict[str, float]
    clock: float
    path: str  # what is wrong with the workdir, or ""


def preflight(mesh_config: MeshConfig, workdir: str) -> None:
    """Checks this host together with all others; process 0 prints the table. Every process makes this call.

    Raises UserError, on every process, where a host is an outlier or cannot use `workdir`. On CPUs rates and memory are not judged: fake
    devices share their host's cores.
    """
    with _limit("devices"):
        mesh, local = make_mesh(mesh_config), jax.local_devices()
        on_cpu = local[0].platform == "cpu"
        kinds = f"{len(local)} x {local[0].device_kind}"
    with _limit("memory and matmul"):
        memory = min(_memory(device) for device in local) / 1e9
        matmul = min(_matmul_rate(device) for device in local) / 1e12
    with _limit("all-reduce"):
        bandwidth = {axis: _all_reduce_rate(mesh, axis) / 1e9 for axis in AXES if mesh.shape[axis] > 1}
    with _limit("clock"):
        clock = _clock_skew()
    with _limit("workdir"):
        path = _try_path(user_path(workdir).absolute())
        rows = _gather(Row(jax.process_index(), socket.gethostname(), kinds, memory, matmul, bandwidth, clock, path))
    if jax.process_index() == 0:
        print(table(rows), flush=True)
    wrong = problems(rows, judges_rates=not on_cpu)
    if wrong:
        raise UserError(f"the pre-flight found {'; '.join(wrong)}: mend these hosts or leave them out")


def table(rows: list[Row]) -> str:
    """Returns the rows as text."""
    axes = list(rows[0].all_reduce)
    reduce_names = [f"all-reduce {axis} GB/s" for axis in axes]
    names = ["process", "host", "devices", "memory GB", "matmul TFLOP/s", *reduce_names, "clock ms", "workdir"]
    cells = [
        [str(row.process), row.host, row.devices, f"{row.memory:.1f}", f"{row.matmul:.3g}",
         *(f"{row.all_reduce[axis]:.3g}" for axis in axes), f"{row.clock * 1e3:+.1f}", row.path or "ok"]
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [names, *cells])


def problems(rows: list[Row], judges_rates: bool = True) -> list[str]:
    """Returns what is wrong, each with the process and host that it is wrong on."""
    found = []
    usual_devices = statistics.mode(row.devices for row in rows)
    usual_clock = statistics.median(row.clock for row in rows)
    for row in rows:
        name = f"process {row.process} on {row.host}"
        if row.devices != usual_devices:
            found.append(f"{name} has {row.devices} where most have {usual_devices}")
        if abs(row.clock - usual_clock) > _MOST_SKEW:
            found.append(f"the clock of {name} is {abs(row.clock - usual_clock):.1f} s {'ahead' if row.clock > usual_clock else 'behind'}")
        if row.path:
            found.append(f"{name}: {row.path}")
    if judges_rates:
        found += _low(rows, "GB of memory", lambda row: row.memory)
        found += _low(rows, "TFLOP/s of matmul", lambda row: row.matmul)
        for axis in rows[0].all_reduce:
            found += _low(rows, f"GB/s of all-reduce over {axis}", lambda row, axis=axis: row.all_reduce[axis])
    return found


def _low(rows: list[Row], unit: str, value) -> list[str]:
    median = statistics.median(map(value, rows))
    return [
        f"process {row.process} on {row.host} has {value(row):.3g} {unit} where the median is {median:.3g}"
        for row in rows
        if value(row) < _SHARE * median
    ]


def _memory(device: jax.Device) -> float:
    """Returns the bytes that JAX can allocate; on a CPU what the host has free."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _matmul_rate(device: jax.Device) -> float:
    """Measures the FLOP/s of a square product, BF16 on accelerators and FP32 on CPUs, the best of a few."""
    size, dtype = (512, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    x = jax.device_put(np.ones((size, size), dtype), device)
    return 2 * size**3 / _best_time(jax.jit(jnp.matmul), x, x)


def _all_reduce_rate(mesh: Mesh, axis: str) -> float:
    """Measures the bus bandwidth in bytes/s of a sum over `axis`, all groups at once, as this process sees it."""
    num_values = (1 << 18) if mesh.devices.flat[0].platform == "cpu" else (1 << 26)
    spec, size = PartitionSpec(AXES), mesh.shape[axis]
    make = on_mesh(lambda: jnp.ones(num_values, jnp.float32), mesh, (), spec, jnp.float32)
    reduce = on_mesh(lambda x: jax.lax.psum(x, axis), mesh, spec, spec, jnp.float32)
    return 2 * (size - 1) / size * 4 * num_values / _best_time(reduce, make())


def _best_time(function, *arrays: jax.Array) -> float:
    function(*arrays).block_until_ready()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        function(*arrays).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _clock_skew() -> float:
    """Measures the seconds that this host's clock is ahead of process 0's, to within the milliseconds in which a barrier is left."""
    skews = []
    for _ in range(_ROUNDS):
        multihost_utils.sync_global_devices("clock")
        now = time.time()
        whole, part = int(now), now % 1  # of a FP32's precision each
        times_P2 = np.reshape(multihost_utils.process_allgather(np.array([whole, int(part * 1e6)], np.int32)), (-1, 2)).astype(np.int64)
        first, own = times_P2[0], times_P2[jax.process_index()]
        skews.append(float(own[0] - first[0]) + float(own[1] - first[1]) / 1e6)
    return statistics.median(skews)


def _try_path(workdir: Path) -> str:
    """Finds what keeps this process from reading and writing in `workdir`, or from seeing there what process 0 writes; "" for nothing."""
    mark, own, problem = workdir / "preflight-0", workdir / f"preflight-{jax.process_index()}", ""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        own.write_text("preflight")
    except OSError as error:
        problem = f"{workdir} cannot be written ({error.strerror})"
    multihost_utils.sync_global_devices("written")
    if not problem and not mark.exists():
        problem = f"{workdir} does not show what process 0 wrote there: it must be on a file system that all hosts share"
    multihost_utils.sync_global_devices("seen")
    with contextlib.suppress(OSError):  # named above
        own.unlink(missing_ok=True)
    return problem


def _gather(row: Row) -> list[Row]:
    """Returns everyone's row."""
    return [Row(**json.loads(text)) for text in tell_all(json.dumps(dataclasses.asdict(row)))]


@contextlib.contextmanager
def _limit(check: str) -> Iterator[None]:
    """Ends the process where a check hangs, which one broken host can make all others do."""

    def end():
        text = f"error: {socket.gethostname()} got no further in the pre-flight's check of {check} for {_LIMIT_SECONDS} s"
        print(text, file=sys.stderr, flush=True)
        os._exit(HUNG)

    timer = threading.Timer(_LIMIT_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
