"""One run at a time in a workdir: two would write files of the same names."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from herd_jax.errors import UserError

NAME = "lock"
_PATIENCE_SECONDS = 3  # the workers of a run that was killed notice it within one


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Holds the workdir, as do the workers that call `join`; whoever dies lets go. Raises UserError where another run holds it."""
    with (workdir / NAME).open("a+") as file:
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while not _hold(file.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                file.seek(0)
                raise UserError(f"another run is at work in {workdir} ({file.read()}): wait for it, or stop it")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _hold(file.fileno(), fcntl.LOCK_SH)  # with the workers; a new run wants it alone
        yield


def join(workdir: Path) -> None:
    """Holds the workdir until this process ends."""
    _hold(os.open(workdir / NAME, os.O_RDONLY), fcntl.LOCK_SH)


def _hold(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: there the user must see to it
        return True
    return True
