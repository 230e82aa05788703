"""One command at a time writes into a directory: two would write files of the same names, and delete each other's.

The lock is a file that names its holder: host, process, when the process began, when it took the lock. The operating system's own lock on
that file (flock) goes with the process, however it ends, so a file that nobody holds is of a command that was killed, and is taken over.
Where the file system has no such locks, the holder's name decides: a process of this host is looked up, one of another host is believed.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from herd_jax.errors import Occupied, UserError

NAME = "lock"
_PATIENCE_SECONDS = 3  # the workers of a command that was killed notice it within one


@contextlib.contextmanager
def only_writer(directory: Path, name: str = NAME) -> Iterator[None]:
    """Holds the directory, which it makes, as do the workers that call `join`; whoever dies lets go.

    Raises Occupied where another command holds it, UserError where it cannot be written.
    """
    path, is_new = directory / name, not directory.is_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = _take(path)
    except OSError as error:
        cannot = f"{directory} cannot be made: " if is_new else ""
        raise UserError(f"{cannot}cannot write {path} ({error.strerror}): see that there is room and that it may be written") from error
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):  # it is not empty
                    directory.rmdir()


def join(directory: Path) -> None:
    """Holds the directory until this process ends."""
    with contextlib.suppress(FileNotFoundError):  # the command that began this worker has just ended
        _hold(os.open(directory / NAME, os.O_RDONLY), fcntl.LOCK_SH)


def _take(path: Path) -> IO:
    """Returns the file, held and with our name in it."""
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while True:
        file = path.open("a+", encoding="utf-8")
        held = _hold(file.fileno(), fcntl.LOCK_EX)
        file.seek(0)
        holder = _parse(file.read())
        is_free = held if held is not None else not (holder and _may_live(holder))
        if is_free and _is_still(file, path):
            _write_name(file)
            if _hold(file.fileno(), fcntl.LOCK_SH) is not False:  # with the workers; a new command wants it alone
                break
        file.close()
        if time.monotonic() > give_up:
            remedy = "wait for it, or stop it" if held is not None else f"wait for it, or delete {path} if it is gone"
            raise Occupied(f"another command is at work in {path.parent} ({_describe(holder)}): {remedy}")
        time.sleep(0.1)
    if holder:
        print(f"note: {_describe(holder)} ended without letting go of {path.parent}: taken over", file=sys.stderr, flush=True)
    return file


def _write_name(file: IO) -> None:
    file.truncate(0)
    mine = {"host": socket.gethostname(), "process": os.getpid(), "began": _began(os.getpid()), "since": time.time()}
    file.write(json.dumps(mine))
    file.flush()


def _hold(descriptor: int, kind: int) -> bool | None:
    """Returns whether the lock is ours now; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        return None
    return True


def _is_still(file: IO, path: Path) -> bool:
    """Returns whether the file is the one of that name: its holder may have deleted it meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _parse(text: str) -> dict:
    """Returns the holder; {} where none is named, or not as we do it."""
    try:
        holder = json.loads(text)
        as_ours = isinstance(holder["host"], str) and type(holder["process"]) is int and type(holder["since"]) in (int, float)
        return holder if as_ours and "began" in holder else {}
    except (ValueError, TypeError, KeyError):
        return {}


def _may_live(holder: dict) -> bool:
    return holder["host"] != socket.gethostname() or _began(holder["process"]) == holder["began"]


def _began(process: int) -> str | None:
    """Returns when a process of this host began, in the kernel's clock ticks since it started; None where there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _describe(holder: dict) -> str:
    if not holder:
        return "a process that has not said its name"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"process {holder['process']} on {holder['host']}, since {since}"
