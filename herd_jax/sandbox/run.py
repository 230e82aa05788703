"""Runs a program that a model wrote, where it can harm nothing: no network, no file but those of its own directory, no signal to others, and limits on
processes, memory, disk, time and output that hold for root too.

The walls are bubblewrap's namespaces and a filter of system calls; the limits are those of the kernel, and, for what it counts by process alone, a look at
all processes together every few milliseconds.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import random
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from herd_jax.errors import UserError
from herd_jax.sandbox import bubblewrap
from herd_jax.sandbox.seccomp import ARCHITECTURES, system_call_filter
from herd_jax.sandbox.usage import usage

GUARD = Path(__file__).with_name("guard.py").read_text()
LOOK = 0.01  # seconds between two looks at what the processes use
USERS = range(20_000, 60_000)  # of whom root makes a sandbox one: the kernel counts the processes of each


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use, all of its processes together where nothing else is said."""

    seconds: float = 10  # of the clock
    memory: int = 2**30  # bytes
    processes: int = 32  # and threads
    output: int = 2**20  # bytes, of stdout and of stderr
    disk: int = 2**26  # bytes, of its directory
    open_files: int = 128  # of each process

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"the limit {field.name} of a sandbox is {getattr(self, field.name)}: it must be more than 0")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a program. `limit` is the one that it went past, a field of `Limits`, and None where it ended by itself."""

    stdout: str
    stderr: str
    returncode: int  # 128 + the signal, where one ended it
    limit: str | None

    @property
    def passed(self) -> bool:
        return self.limit is None and self.returncode == 0


def run_python(program: str, limits: Limits = Limits(), stdin: str = "", unsafe: bool = False) -> Outcome:
    """Runs a Python program; see `run`."""
    return run([sys.executable, "-I", "program.py"], {"program.py": program}, limits, stdin, unsafe)


def runs_to_its_end(program: str, limits: Limits = Limits(), unsafe: bool = False) -> bool:
    """Returns whether a Python program, such as an answer with its tests behind it, comes to its end: without an exception, an exit, or a limit."""
    finished = secrets.token_hex(16)  # a program that ends before its tests prints no such word
    outcome = run_python(f"{program}\nprint('\\n{finished}')\n", limits, unsafe=unsafe)
    return outcome.passed and outcome.stdout.splitlines()[-1:] == [finished]


def run(command: Sequence[str], files: Mapping[str, str] = {}, limits: Limits = Limits(), stdin: str = "", unsafe: bool = False) -> Outcome:
    """Runs a command in a new directory with `files` (path in it -> content), which is gone afterwards.

    Args:
        command: the program, found in the system's directories or beside this Python, and its arguments.
        unsafe: where the machine has no means to contain it, run it with the limits alone. Without, that is refused.

    Raises:
        UserError: the machine has no means; or a file would lie outside the directory.
    """
    for name in files:
        if os.path.isabs(name) or ".." in Path(name).parts or not Path(name).parts:
            raise UserError(f"the file {name!r} of a sandbox is outside its directory: give a relative path without '..'")
    check_contained(unsafe)
    return _run(bubblewrap_program(), list(command), files, limits, stdin)


def check_contained(unsafe: bool = False) -> None:
    """Raises UserError where this machine has no means to contain a program, unless that is accepted."""
    if bubblewrap_program() or unsafe:
        return
    why, remedy = "bubblewrap is not installed", "pip install 'herd-jax[sandbox]'"
    if sys.platform != "linux":
        why, remedy = f"{sys.platform} has no namespaces", "use Linux"
    elif platform.machine() not in ARCHITECTURES:
        why, remedy = f"the system calls of {platform.machine()} are not known here", f"use {' or '.join(ARCHITECTURES)}"
    elif bubblewrap.candidates():
        why, remedy = "bubblewrap may not make namespaces here", "allow user namespaces, in a container with --security-opt seccomp=unconfined"
    raise UserError(f"programs that a model wrote cannot be contained on this machine ({why}): {remedy}, or accept the danger with --unsafe-execution")


@functools.cache
def bubblewrap_program() -> str | None:
    """Returns the bubblewrap that works here, None where none does: a namespace may be forbidden in a container."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return None
    works = lambda program: _run(program, [sys.executable, "-I", "-c", "print(7)"], {}, Limits(seconds=30), "").stdout == "7\n"
    return next((program for program in bubblewrap.candidates() if works(program)), None)


def _run(program: str | None, command: list[str], files: Mapping[str, str], limits: Limits, stdin: str) -> Outcome:
    user = random.SystemRandom().choice(USERS) if program and os.geteuid() == 0 else 0
    of_kernel = {
        "RLIMIT_CPU": int(limits.seconds) + 1, "RLIMIT_FSIZE": limits.disk, "RLIMIT_NOFILE": limits.open_files, "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": limits.processes + 1, "RLIMIT_AS": max(4 * limits.memory, 2**32),
    }  # fmt: skip
    guarded = [sys.executable, "-I", "-S", "-c", GUARD, str(user), json.dumps(of_kernel), *command]
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(tempfile.TemporaryFile())
        given.write(json.dumps({"files": dict(files), "stdin": stdin}).encode())
        given.seek(0)
        options, descriptors = {"cwd": "/"}, []
        if program:
            filtering = stack.enter_context(tempfile.TemporaryFile())
            filtering.write(system_call_filter())
            filtering.seek(0)
            descriptors = [filtering.fileno()]
            guarded = bubblewrap.enclosed(program, guarded, limits.disk, *descriptors)
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            options = {"cwd": directory, "env": bubblewrap.environment(directory)}
        process = subprocess.Popen(
            guarded, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=descriptors, start_new_session=True, **options
        )
        try:
            (stdout, stderr), limit = _watch(process, limits, bubblewrap.OWN_PROCESSES if program else 0)
        finally:
            _end(process)
    stdout, stderr = (part.decode(errors="replace") for part in (stdout, stderr))
    returncode = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return Outcome(stdout, stderr, returncode, limit or _refused(returncode, stderr))


def _watch(process: subprocess.Popen, limits: Limits, others: int) -> tuple[list[bytes], str | None]:
    """Returns what the program wrote until it ended or went past a limit, and which. `others`: processes that are not the program's."""
    outputs = {process.stdout: bytearray(), process.stderr: bytearray()}
    written = lambda: [bytes(part[: limits.output]) for part in outputs.values()]
    end = time.monotonic() + limits.seconds
    with selectors.DefaultSelector() as selector:
        for pipe in outputs:
            selector.register(pipe, selectors.EVENT_READ)
        looked = 0.0
        while True:
            for key, _ in selector.select(LOOK):
                part = os.read(key.fd, 2**16)
                outputs[key.fileobj] += part
                if not part:
                    selector.unregister(key.fileobj)
                if len(outputs[key.fileobj]) > limits.output:
                    return written(), "output"
            now = time.monotonic()
            if process.poll() is not None and not any(part for part in selector.select(0)):
                return written(), None
            if now >= end:
                return written(), "seconds"
            if now - looked >= LOOK:
                looked, used = now, usage(process.pid)
                if used.memory > limits.memory:
                    return written(), "memory"
                if used.threads > limits.processes + others:
                    return written(), "processes"
            if not selector.get_map():
                time.sleep(LOOK)  # it has closed its outputs and goes on


def _end(process: subprocess.Popen) -> None:
    """Ends the program and all that it started: with bubblewrap, the end of the first process of its namespace is that of all."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()


def _refused(returncode: int, stderr: str) -> str | None:
    """Returns the limit of the kernel that a program ran into and ended of, as far as it tells."""
    last = (stderr.strip().splitlines() or [""])[-1]
    if returncode == 0:
        return None
    if returncode in (128 + signal.SIGXCPU, 128 + signal.SIGXFSZ):
        return "seconds" if returncode == 128 + signal.SIGXCPU else "disk"
    signs = {"MemoryError": "memory", "BlockingIOError": "processes", "OSError: [Errno 28]": "disk", "OSError: [Errno 27]": "disk", "OSError: [Errno 24]": "open_files"}
    return next((limit for sign, limit in signs.items() if last.startswith(sign)), None)
