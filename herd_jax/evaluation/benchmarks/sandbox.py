"""Runs a program that a model wrote, in a process that can do little: limits on time, memory and files, a directory of its own, and no
network where the system lets a process cut itself off (Linux with user namespaces). It can read and write what its user can; of root, the
limit on processes does not hold, and so tasks that run code refuse to run as root.

It keeps a careless program from harm. A determined one needs a virtual machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

MEMORY = 2 * 2**30  # bytes of address space
FILES = 2**24  # bytes that a file may have
FINISHED = "finished"  # printed by a program that ran to its end

# The limits are set by the process itself, before it runs what it reads.
_GUARD = """
import ctypes, resource, sys
seconds, memory, files = map(int, sys.argv[1:])
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
try:
    ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)
except (AttributeError, OSError):
    pass
for limit, value in (("CPU", seconds), ("AS", memory), ("DATA", memory), ("FSIZE", files), ("CORE", 0), ("NOFILE", 64), ("NPROC", 64)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
program = sys.stdin.read()
sys.stdin = open("/dev/null")
exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
"""


def runs(program: str, seconds: int = 10) -> bool:
    """Returns whether the Python program runs to its end, without an exception, an exit or the end of its `seconds`, of CPU and of the clock."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-I", "-c", _GUARD, str(seconds), str(MEMORY), str(FILES)]
        environment = {"PATH": "/usr/bin:/bin", "HOME": directory, "TMPDIR": directory}
        with open(os.path.join(directory, "output"), "w+b") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, cwd=directory, env=environment,
                start_new_session=True,
            )  # fmt: skip
            try:
                process.communicate(f"{program}\nprint('\\n{FINISHED}')\n".encode(errors="replace"), timeout=seconds)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
                process.wait()
            output.seek(max(0, output.seek(0, os.SEEK_END) - 64))
            return process.returncode == 0 and output.read().decode(errors="replace").splitlines()[-1:] == [FINISHED]
