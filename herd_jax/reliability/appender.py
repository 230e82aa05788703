"""Files that a run appends to and can do without (metrics, timeline, incidents): a full disk costs what would have gone there, not the run."""

import contextlib
import errno
import os
import sys
import time
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SECONDS_BETWEEN_WARNINGS = 600.0
_last_warning = -float("inf")  # of time.monotonic()


class Appender:
    """Appends to the file at `path`, which is made with its directory. Raises OSError where that fails, but not because a disk is full."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, None
        try:
            self._open()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            warn_of_loss(path, error)

    def append(self, data: bytes) -> None:
        """Writes all of `data`; where that cannot be, nothing of it, and warns of that (`warn_of_loss`)."""
        try:
            if self._file is None:
                self._open()
            size = self._file.seek(0, os.SEEK_END)
            try:
                left = memoryview(data)
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):  # such as a device
                    self._file.truncate(size)
                raise
        except OSError as error:
            warn_of_loss(self._path, error)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it would say was said
                self._file.close()
            self._file = None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)


def warn_of_loss(path: Path, error: OSError) -> None:
    """Writes one line on stderr, and for 10 minutes no other, whatever the file: a full disk refuses them all."""
    global _last_warning
    if time.monotonic() - _last_warning > _SECONDS_BETWEEN_WARNINGS:
        _last_warning = time.monotonic()
        print(f"warning: cannot write {path} ({error.strerror}): the run goes on without, and notes nothing until it can", file=sys.stderr)
