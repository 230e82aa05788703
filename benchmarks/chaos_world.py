"""What a chaotic run stands on, and how each piece of it is broken: a disk, a network, memory, a clock. `chaos.py` uses it.

All of it is real and of this machine: an ext4 file system in a file, with few inodes and a limit on what is written a second (blkio cgroup);
network namespaces, one for each process, on a bridge; a limit on memory (memory cgroup) with a swap file; a thread in each process that
flips a bit of a live array. Only the clock is shifted for Python alone: the kernel's cannot be for some processes. Needs root; a piece that
cannot be made is left out.
"""

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CGROUPS = Path("/sys/fs/cgroup")
DISK_BYTES, INODES, SWAP_BYTES = 96 << 20, 1024, 2 << 30
SLOW_BYTES_PER_SECOND = 256 << 10
IN_EACH_PROCESS = '''
"""Shifts the clock of a training process, and flips one bit of a live array of it, when files ask for it."""
import ctypes, mmap, os, pathlib, random, struct, sys, threading, time

SHAPE = (64,)  # the head's norm: every device has a copy of it and of its moments
place = pathlib.Path(os.environ["CHAOS"])


def watch(asked):
    while True:
        time.sleep(0.01)
        if asked.exists():
            import jax

            arrays = [array for array in jax.live_arrays() if array.shape == SHAPE and array.dtype == "float32" and not array.is_deleted()]
            if arrays:
                address = random.choice(arrays).addressable_data(0).unsafe_buffer_pointer() + 4 * random.randrange(SHAPE[0]) + 2
                ctypes.c_uint8.from_address(address).value ^= 0x20  # of the mantissa: the value stays plausible
                asked.unlink()


def shift(real, unit):
    return lambda: real() + struct.unpack("q", clock[:8])[0] * unit


with open(place / "clock", "rb") as file:
    clock = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
time.time, time.time_ns = shift(time.time, 1), shift(time.time_ns, 10**9)
if "herd_jax.train" in sys.orig_argv:
    threading.Thread(target=watch, args=(place / ("flip-" + os.environ.get("HERD_PROCESS_ID", "0")),), daemon=True).start()
'''
PYTHON = """#!/usr/bin/env bash
# Starts a process of the training in its network and its cgroups.
[[ -n $HERD_PROCESS_ID ]] || exec {python} "$@"
for group in {cgroups}; do echo $$ > "$group/cgroup.procs"; done
{enter}
exec {python} "$@"
"""
ENTER = """export HERD_COORDINATOR=10.77.0.1:${{HERD_COORDINATOR##*:}}
exec nsenter --net=/run/netns/{name}-$HERD_PROCESS_ID unshare --uts bash -c 'hostname "10.77.0.$1"; exec "${{@:2}}"' _ $((HERD_PROCESS_ID + 1)) {python} "$@"
"""


class World:
    """The ground of one run in `directory`, whose checkpoints are on its own disk. `missing` says which pieces could not be made, and why."""

    def __init__(self, directory: Path, processes: int) -> None:
        self.missing: dict[str, str] = {}
        self._undo = contextlib.ExitStack()
        self._directory, self._processes, self._name = directory, processes, f"chaos{os.getpid()}"
        self.disk = directory / "run" / "checkpoints"
        self._tools = directory / "tools"
        for path in (self.disk, self._tools):
            path.mkdir(parents=True)
        for piece in (self._make_disk, self._make_slow, self._make_network, self._make_swap):
            try:
                piece()
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None) or str(error)
                self.missing[piece.__name__.removeprefix("_make_")] = said.strip().splitlines()[-1]
        (self._tools / "sitecustomize.py").write_text(IN_EACH_PROCESS)
        (self._tools / "clock").write_bytes(bytes(8))
        self._write_python()

    def environment(self) -> dict[str, str]:
        """Returns what the launcher, and the processes that it starts, need to stand on this ground."""
        path = os.pathsep.join([str(self._tools), str(ROOT)])
        return {"PYTHONPATH": path, "HERD_PYTHON": str(self._tools / "python"), "CHAOS": str(self._tools)}

    def close(self) -> None:
        self._undo.close()

    @contextlib.contextmanager
    def slow_disk(self):
        limit = self._blkio / "blkio.throttle.write_bps_device"
        limit.write_text(f"{self._device} {SLOW_BYTES_PER_SECOND}")
        try:
            yield
        finally:
            limit.write_text(f"{self._device} 0")

    @contextlib.contextmanager
    def full_disk(self):
        ballast = self.disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        try:
            yield
        finally:
            ballast.unlink()

    @contextlib.contextmanager
    def no_inodes(self):
        ballast = self.disk / "ballast"
        ballast.mkdir()
        with contextlib.suppress(OSError):
            for i in range(INODES):
                (ballast / str(i)).touch()
        try:
            yield
        finally:
            shutil.rmtree(ballast)

    @contextlib.contextmanager
    def read_only_disk(self):
        while True:  # not while a file is open to be written
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("mount", "-o", "remount,ro", self.disk)
                break
            time.sleep(0.01)
        try:
            yield
        finally:
            _run("mount", "-o", "remount,rw", self.disk)

    @contextlib.contextmanager
    def network_pause(self, process: int):
        _run("ip", "link", "set", f"{self._name}-{process}", "down")
        try:
            yield
        finally:
            _run("ip", "link", "set", f"{self._name}-{process}", "up")

    @contextlib.contextmanager
    def little_memory(self):
        """Leaves the processes 70 % of the memory that they use."""
        limit = self._memory / "memory.limit_in_bytes"
        used = dict(line.split() for line in (self._memory / "memory.stat").read_text().splitlines())["total_rss"]
        limit.write_text(str(int(used) * 7 // 10))
        try:
            yield
        finally:
            limit.write_text("-1")

    @contextlib.contextmanager
    def shifted_clock(self, seconds: int):
        """Shifts the clock for good."""
        with (self._tools / "clock").open("r+b") as file:
            (before,) = struct.unpack("q", file.read())
            file.seek(0)
            file.write(struct.pack("q", before + seconds))
        yield

    def flip_bit(self, process: int) -> None:
        """Flips one bit of a parameter, or of one of its moments, in the memory of a process."""
        asked = self._tools / f"flip-{process}"
        asked.touch()
        end = time.monotonic() + 10
        while asked.exists() and time.monotonic() < end:
            time.sleep(0.01)

    def _make_disk(self) -> None:
        image = self._directory / "disk.img"
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        device = _run("losetup", "-f", "--show", image).strip()
        self._undo.callback(_run, "losetup", "-d", device)
        _run("mkfs.ext4", "-q", "-N", INODES, device)
        _run("mount", device, self.disk)
        self._undo.callback(_run, "umount", self.disk)
        self._device = Path(f"/sys/block/{Path(device).name}/dev").read_text().strip()

    def _make_slow(self) -> None:
        if "disk" in self.missing:
            raise OSError("there is no disk of its own")
        self._blkio = CGROUPS / "blkio" / self._name
        self._make_cgroup(self._blkio)
        (self._blkio / "blkio.throttle.write_bps_device").write_text(f"{self._device} 0")

    def _make_swap(self) -> None:
        self._memory = CGROUPS / "memory" / self._name
        self._make_cgroup(self._memory)
        swap = self._directory / "swap"
        _run("fallocate", "-l", SWAP_BYTES, swap)
        swap.chmod(0o600)
        _run("mkswap", swap)
        _run("swapon", swap)
        self._undo.callback(_run, "swapoff", swap)

    def _make_network(self) -> None:
        _run("ip", "link", "add", self._name, "type", "bridge")
        self._undo.callback(_run, "ip", "link", "del", self._name)
        _run("ip", "link", "set", self._name, "up")
        for i in range(self._processes):
            name = f"{self._name}-{i}"
            _run("ip", "netns", "add", name)
            self._undo.callback(_run, "ip", "netns", "del", name)  # its end of the pair goes with it, and so does the other
            _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", name, "master", self._name, "up")
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", device, "up")

    def _make_cgroup(self, path: Path) -> None:
        path.mkdir()
        self._undo.callback(_remove_cgroup, path)

    def _write_python(self) -> None:
        cgroups = [str(CGROUPS / kind / self._name) for piece, kind in (("slow", "blkio"), ("swap", "memory")) if piece not in self.missing]
        enter = "" if "network" in self.missing else ENTER.format(name=self._name, python=sys.executable)
        python = self._tools / "python"
        python.write_text(PYTHON.format(python=sys.executable, cgroups=" ".join(cgroups), enter=enter))
        python.chmod(0o755)


def _run(*command) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def _remove_cgroup(path: Path) -> None:
    """Removes a cgroup, which its last process may only just have left."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            path.rmdir()
            return
        time.sleep(0.1)
