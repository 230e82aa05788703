"""What the processes of a sandbox use together, as Linux counts it."""

import os
from pathlib import Path
from typing import NamedTuple

PAGE = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    threads: int  # of all processes, as the kernel's limit on processes counts
    memory: int  # bytes in memory; pages that two processes share count twice


def usage(process: int) -> Usage:
    """Returns what a process uses with all that it started, however far down."""
    waiting, threads, memory = [process], 0, 0
    while waiting:
        folder = Path("/proc", str(waiting.pop()))
        try:
            memory += int((folder / "statm").read_text().split()[1]) * PAGE
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
                threads += 1
        except OSError:  # it has ended
            continue
    return Usage(threads, memory)
