"""How the checkpointer uses Orbax: who writes what, how long anyone waits, which exceptions mean damage, which steps are kept."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import logging
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from herd_jax.errors import UserError
from herd_jax.training.checkpoints.background_barriers import BackgroundBarriers

# How long a process waits for the others, in a save or a restore, and how long the writing of one checkpoint may take; at the start of a
# save Orbax waits for 300 s.
TIME_LIMIT_S = 600
ALONE_S = 15  # after so long, a process that could not read or write a checkpoint assumes that the others could, and wait for it in Orbax
TEMPORARY = ocp.path.atomicity.TMP_DIR_SUFFIX
# Of the exceptions that reading raises (of any class, for damaged files), those that say nothing about the files.
_NOT_DAMAGE = (RuntimeError, MemoryError, PermissionError)  # jax's own errors, such as device memory, are RuntimeErrors
_NOT_DAMAGE_TEXTS = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "Too many open files")
_MIN_CHUNK_BYTES = 1 << 20  # smaller chunks cost noticeably more
_FILES_OF_A_SAVE = 64  # of each process, directories too
_barriers = itertools.count()


class UnreadableHere(Exception):
    """This process cannot read a checkpoint whose files are damaged, and the others can, or do not know yet: they wait in Orbax's own barrier."""


class Unreadable(Exception):
    """A checkpoint's files are damaged, or are not those that this process needs; the text says how, in brief."""


def make_manager(directory: Path, private: bool, policy: "NewestAndBest", when_written: Callable[[], None]) -> ocp.CheckpointManager:
    """Returns Orbax's manager of a directory that all processes share, or of one that is `private` to this process.

    `when_written` is called in the background when a save is complete (on process 0, or where it is private).
    """
    # Naming the processes makes Orbax wait at barriers that have a time limit.
    processes = {jax.process_index()} if private else set(range(jax.process_count()))
    prefix = f"process {jax.process_index()}" if private else None
    processing = ocp.options.MultiprocessingOptions(None if private else 0, processes, prefix)
    handlers = {}
    if private:  # each process is its own primary, and writes all that its devices hold, replicas or not
        arrays = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        state = ocp.PyTreeCheckpointHandler(multiprocessing_options=processing, type_handler_registry=registry)
        handlers = {"state": state, "record": ocp.JsonCheckpointHandler(multiprocessing_options=processing)}
    options = ocp.CheckpointManagerOptions(
        create=False,
        lightweight_initialize=True,
        save_root_metadata=False,
        preservation_policy=policy,
        multiprocessing_options=processing,
        async_options=ocp.options.AsyncOptions(
            timeout_secs=TIME_LIMIT_S,
            barrier_sync_fn=None if private or jax.process_count() == 1 else BackgroundBarriers(),
            post_finalization_callback=when_written,
            create_directories_asynchronously=not private,  # else one process's note that its directory is made starts another's writing
        ),
    )
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers or None)


def state_to_save(state: Any, private: bool) -> ocp.args.CheckpointArgs:
    return (ocp.args.PyTreeSave if private else ocp.args.StandardSave)(state, jax.tree.map(_save_args, state))


def state_to_restore(abstract_state: Any, private: bool) -> ocp.args.CheckpointArgs:
    if private:
        return ocp.args.PyTreeRestore(abstract_state, ocp.checkpoint_utils.construct_restore_args(abstract_state))
    return ocp.args.StandardRestore(abstract_state)


def require_room(directory: Path, state: Any, private: bool) -> None:
    """Raises OSError on all processes where the disk cannot take `state`: read-only, too few bytes or too few inodes.

    Where that comes later, some processes are left waiting in Orbax's barriers.
    """
    arrays = jax.tree.leaves(state)
    if private:
        arrays = [shard.data for array in arrays for shard in array.addressable_shards]
    disk, problem = os.statvfs(directory), None
    if disk.f_flag & os.ST_RDONLY:
        problem = os.strerror(errno.EROFS)
    elif disk.f_bavail * disk.f_frsize < sum(array.nbytes for array in arrays):
        problem = os.strerror(errno.ENOSPC)
    elif 0 < disk.f_files and disk.f_favail < _FILES_OF_A_SAVE * jax.process_count():  # some file systems have no limit, and say 0
        problem = "no inode is left: remove files from that file system"
    if on_any(problem is not None, "saving a checkpoint"):
        raise OSError(problem or "another process could not")


def _save_args(array: jax.Array) -> ocp.SaveArgs:
    """Returns how an array is cut: each layer of a stack is a chunk, to be read without the others; a row of a matrix is too small for one."""
    row_shape = array.sharding.shard_shape(array.shape)[1:]
    is_stack = math.prod(row_shape) * array.dtype.itemsize >= _MIN_CHUNK_BYTES
    return ocp.SaveArgs(shard_axes=(0,) if is_stack else ())


@dataclasses.dataclass
class NewestAndBest:
    """Orbax's PreservationPolicy: keeps the newest `keep` that are whole and the one with the lowest validation loss (of equals the later).

    Whole: its files have the sizes with which they were written; so a truncated one never makes an older, whole one go. (Bits that
    flipped show only when it is read.) Orbax's own BestN has its metrics read when the manager is made, where one damaged file
    would raise for all steps.
    """

    directory: Path
    keep: int
    val_losses: dict[int, float | None] = dataclasses.field(default_factory=dict)
    sizes: dict[int, dict[Path, int]] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: list, *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        whole = [step for step in steps if step == steps[-1] or self._is_whole(step)]  # the last is the one that is being written
        evaluated = [step for step in whole if self.val_losses.get(step) is not None]
        best = min(evaluated, key=lambda step: (self.val_losses[step], -step), default=None)
        return [step == best or step in steps[-self.keep :] or step in whole[-self.keep :] for step in steps]

    def note_written(self, step: int) -> Path:
        """Notes the sizes of the step's files, once they are written, and returns their directory, which may still have its temporary name."""
        (directory,) = [*self.directory.glob(f"{step}{TEMPORARY}*"), *self.directory.glob(str(step))][:1]
        self.sizes[step] = {path.relative_to(directory): path.stat().st_size for path in directory.glob("*/**/*") if path.is_file()}
        return directory

    def _is_whole(self, step: int) -> bool:
        paths = {path: self.directory / str(step) / path for path in self.sizes.get(step, ())}
        return all(path.is_file() and path.stat().st_size == self.sizes[step][name] for name, path in paths.items())


@contextlib.contextmanager
def within_time(what: str) -> Iterator[None]:
    """Turns the end of the time limit of a barrier into a UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in ("DEADLINE_EXCEEDED", "Barrier")):
            raise
        raise UserError(
            f"another process did not come to {what} within {TIME_LIMIT_S} s or has died ({brief(error)}): look for its own error in its"
            " log, then start all processes again"
        ) from error


def wait_for_all(what: str, seconds: int | None = None) -> None:
    """Returns when all processes are here; raises UserError where one is not within the time limit."""
    with within_time(what):
        processes = set(range(jax.process_count()))
        ocp.multihost.sync_global_processes(f"herd_jax {what} {next(_barriers)}", timeout=seconds or TIME_LIMIT_S, processes=processes)


def on_any(flag: bool, what: str, seconds: int | None = None) -> bool:
    """Returns whether `flag` is set on any process; all of them must call it."""
    wait_for_all(what, seconds)
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def on_every_process(steps: list[int]) -> list[int]:
    """Returns those of the steps (at most the 16 newest) that every process has."""
    padded = np.array(([-1] * 16 + steps)[-16:], np.int32)
    wait_for_all("comparing the local checkpoints")
    everyones = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, 16)
    return [step for step in steps if (everyones == step).any(axis=1).all()]


@contextlib.contextmanager
def reading(private: bool) -> Iterator[None]:
    """Turns the errors of damaged files into Unreadable on every process, if all of them come back from reading; else into UnreadableHere.

    From reading `private` checkpoints all come back, since there nobody waits for others.
    """
    damage = None
    try:
        with within_time("reading a checkpoint"):
            yield
    except UserError:
        raise
    except Exception as error:
        damage = error.__cause__ or error  # the storage layer's error, where Orbax wraps it in one of its own
        if isinstance(damage, _NOT_DAMAGE) or any(text in str(damage) for text in _NOT_DAMAGE_TEXTS):
            raise
    try:
        damaged = on_any(damage is not None, "reading a checkpoint", None if private or damage is None else ALONE_S)
    except UserError:
        if damage is None:
            raise
        raise UnreadableHere(brief(damage)) from damage
    if damaged:
        raise Unreadable(brief(damage) if damage else "another process cannot read it") from damage


def brief(error: BaseException) -> str:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(first_line, width=120, placeholder="...")


def warn(text: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr)


@functools.cache
def report_each_error_once() -> None:
    """Silences the echoes of errors that Orbax also raises: its log of them, and the reads in flight when one of them failed.

    It also silences Orbax's note, at each private save, that it does not log how many bytes all processes wrote.
    """
    report = sys.unraisablehook

    def is_news(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return "Global object size logging disabled" not in record.getMessage()
        return "orbax" not in record.pathname + record.getMessage()

    def report_news(unraisable: Any) -> None:
        source = getattr(getattr(unraisable.object, "cr_code", None), "co_filename", "")
        if "orbax" not in source and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    logging.getLogger("absl").addFilter(is_news)
    logging.getLogger("asyncio").addFilter(is_news)
    sys.unraisablehook = report_news
