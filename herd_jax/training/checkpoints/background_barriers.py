"""The barriers of a save's background, to which a process that could not write comes too.

Orbax has two, "written" and "committed", and lets a process whose writing failed pass them by; the others then wait there for it until
their time limit. With the barriers here, that process comes to those that it passed by, and says that it failed; the others then raise
too, before process 0 gives the checkpoint its name. So the end of a save, good or bad, is one that all processes reach together.
"""

import itertools
import threading

import jax
from jax._src import distributed
from orbax.checkpoint import multihost

_WRITTEN, _COMMITTED = "async_write_complete", "async_commit_complete"  # as Orbax calls them
_BEGINS_OR_ENDS = "set_value_start"  # the barrier with which a save begins, in the main thread, and ends, in the background
_saves = itertools.count()  # of all directories, by all processes in the same order


class BackgroundBarriers:
    """`barrier_sync_fn` of Orbax's AsyncOptions, for a directory that all processes share."""

    def __init__(self) -> None:
        self._wait = multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        self._save, self._left = 0, []

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns when all processes are here. Raises OSError where one of them could not write."""
        phase = next((phase for phase in self._left if phase in key), None)
        if phase:
            self._meet(phase, timeout_ms)
        elif _BEGINS_OR_ENDS not in key:
            self._wait(key=key, timeout_ms=timeout_ms)
        else:
            begins = threading.current_thread() is threading.main_thread()
            for left_out in () if begins else tuple(self._left):
                self._meet(left_out, timeout_ms, failed=True)
            self._wait(key=key, timeout_ms=timeout_ms)
            self._save, self._left = (next(_saves), [_WRITTEN, _COMMITTED]) if begins else (self._save, [])

    def _meet(self, phase: str, timeout_ms: int, failed: bool = False) -> None:
        self._left.remove(phase)
        key, client = f"herd_jax save {self._save} {phase}", distributed.global_state.client
        if failed:
            client.key_value_set(f"{key}/failed/{jax.process_index()}", "")
        self._wait(key=key, timeout_ms=timeout_ms)
        if not failed and client.key_value_dir_get(f"{key}/failed/"):
            raise OSError("another process could not write it")
