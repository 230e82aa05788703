"""Checkpoints of a training run: what is in one, when it is trusted, which are kept. The loop decides when to save.

Orbax (`CheckpointManager`) writes: each process its own shards, in the background, into a temporary directory that is renamed
when complete, so that a crash leaves at most a half-written directory, never listed as a step. It reads any array onto any
sharding and deletes the steps that our preservation policy gives up. We add:
- a record (JSON, with its own checksum) beside the state: run config, data position, validation loss, and for every leaf its type
  and a checksum that does not depend on sharding, computed on the devices before saving and compared after restoring;
- falling back: a checkpoint that cannot be read, or whose leaves differ from their checksums, is set aside and the one before
  is used, while a state that does not fit the model is the user's error and touches nothing;
- errors that name the disk, not the library.
Checksums find what changed; they do not repair. Bytes that no array needs (padding, the library's notes) may change unseen.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import sys
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from herd_jax.errors import UserError

PyTree = Any
# Of the exceptions that reading raises (of any class, for damaged files), those that say nothing about the files.
_NOT_DAMAGE = (RuntimeError, MemoryError, PermissionError)  # jax's own errors, such as device memory, are RuntimeErrors
_NOT_DAMAGE_TEXTS = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "Too many open files")
_MIN_CHUNK_BYTES = 1 << 20  # below it, a chunk's own cost shows
_TEMPORARY = ocp.path.atomicity.TMP_DIR_SUFFIX


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often to save (in steps) and how many of the newest checkpoints to keep; the best by validation loss is kept too."""

    every_steps: int = 100
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name} is {getattr(self, name)}: set it to 1 or more")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: `state` on the shardings that were asked for, `config` and `position` as they were saved."""

    step: int
    state: PyTree
    config: dict
    position: dict


class _Unreadable(Exception):
    """A checkpoint's files are damaged; the text says how, in brief."""


class Checkpointer:
    """The checkpoints under `directory`: the `keep` newest and the one with the lowest validation loss.

    In a run of several processes each of them makes the same calls; the directory is on a file system that they share.
    A reader (inference) may open the directory of a run that is still training: nothing is deleted before the first save.
    """

    def __init__(self, directory: str | os.PathLike, keep: int) -> None:
        self.directory = Path(directory).absolute()
        _report_each_error_once()
        self._policy = _NewestAndBest(keep, val_losses={})
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(create=False, lightweight_initialize=True, preservation_policy=self._policy),
        )
        self._saved = False

    def save(self, step: int, state: PyTree, config: dict, position: dict, val_loss: float | None = None) -> None:
        """Starts saving `state` (jax.Array leaves) and returns once it is copied: the arrays may be donated at once.

        `config` and `position` are json-able. Waits for a save still under way. Raises UserError where that one, or this one,
        cannot be written; the earlier checkpoints are then intact.
        """
        val_loss = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        self._policy.val_losses[step] = val_loss
        record = {"config": config, "position": position, "val_loss": val_loss}
        record |= {"leaves": _leaf_types(state), "checksums": _checksums(state)}
        with self._writing():
            if not self._saved:
                self._prepare_directory()
            state_args = ocp.args.StandardSave(state, jax.tree.map(_save_args, state))
            items = ocp.args.Composite(state=state_args, record=ocp.args.JsonSave(_sealed(record)))
            self._manager.save(step, args=items, force=True)
        self._saved = True

    def steps(self) -> list[int]:
        """The steps whose checkpoints are completely written, oldest first."""
        return sorted(ocp.path.step.checkpoint_steps(self.directory))

    def config(self) -> dict | None:
        """The run config stored with the newest checkpoint whose record is readable; None where there is none."""
        newest = self.newest()
        return newest and newest[1]["config"]

    def newest(self) -> tuple[Path, dict] | None:
        """Of the newest checkpoint whose record is readable: the directory in which Orbax has its state, and the record."""
        self.wait()
        for step in reversed(self.steps()):
            with contextlib.suppress(_Unreadable):  # restore() names it and sets it aside
                return self.directory / str(step) / "state", self._read_record(step)
        return None

    def restore(self, abstract_state: PyTree) -> Restored | None:
        """Reads the newest readable checkpoint onto the shardings of `abstract_state` (leaves: ShapeDtypeStruct with sharding).

        None where no checkpoint is. Damaged ones newer than the one returned are renamed to `DIRECTORY.corrupt-STEP`, with a
        warning each. Raises UserError where none is readable (then nothing is renamed) or where the saved state has other leaves,
        shapes or dtypes than `abstract_state`.
        """
        self.wait()
        for path in sorted(self.directory.glob(f"*{_TEMPORARY}*")):
            _warn(f"the checkpoint of step {path.name.split('.')[0]} is half-written (its save did not finish): it is ignored")
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self._read(step, abstract_state)
            except _Unreadable as error:
                damaged[step] = str(error)
                continue
            for damaged_step, reason in damaged.items():
                aside = self._set_aside(damaged_step)
                _warn(f"the checkpoint of step {damaged_step} is unreadable ({reason}): moved to {aside}, using step {step}")
            return restored
        for step, reason in damaged.items():
            remedy = "bring back a good copy, or move the directory away to start anew"
            raise UserError(f"no checkpoint in {self.directory} is readable (step {step}: {reason}): {remedy}")
        return None

    def wait(self) -> None:
        """Returns when no save is under way; raises UserError where the last one could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, then releases the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()  # does not raise again what wait() raised

    def _prepare_directory(self) -> None:
        """Before the first save: makes the directory, removes interrupted saves, reads which earlier step is the best."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for path in self.directory.glob(f"*{_TEMPORARY}*"):
                shutil.rmtree(path)
        for step in self.steps():
            with contextlib.suppress(_Unreadable):  # it cannot be called the best
                self._policy.val_losses[step] = self._read_record(step)["val_loss"]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the disk's errors, of this save or of the one in the background, into a UserError."""
        try:
            yield
        except (OSError, ValueError) as error:
            text = str(error)
            if not isinstance(error, OSError) and "os_error_code" not in text:
                raise
            self._manager.reload()  # forget the failed step, remember those that its success would have deleted
            reason = "no space is left" if "No space left" in text or "quota exceeded" in text else _brief(error)
            raise UserError(
                f"cannot write a checkpoint in {self.directory} ({reason}): mend that and give the same command again;"
                " the earlier checkpoints are intact"
            ) from error

    def _read(self, step: int, abstract_state: PyTree) -> Restored:
        """The checkpoint of `step`, verified; all processes find the same."""
        record = self._read_record(step)
        _require_same_leaves(step, record["leaves"], abstract_state)
        with _reading():
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))).state
        for name, checksum in _checksums(state).items():
            if checksum != record["checksums"][name]:
                raise _Unreadable(f"the data of {name} changed since it was saved")
        return Restored(step, state, record["config"], record["position"])

    def _read_record(self, step: int) -> dict:
        with _reading():
            sealed = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
            if _sealed(sealed["record"]) != sealed:
                raise ValueError("its record changed since it was saved")
            return sealed["record"]

    def _set_aside(self, step: int) -> Path:
        """Renames the step's directory, so that the same step can be saved again."""
        aside = self.directory.with_name(f"{self.directory.name}.corrupt-{step}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}.again")
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices(f"checkpoint of step {step} set aside")
        self._manager.reload()
        return aside


@dataclasses.dataclass
class _NewestAndBest:
    """Orbax's PreservationPolicy: keeps the newest `keep` and the one with the lowest validation loss (the later of two equals).

    Orbax's own BestN has its metrics read when the manager is made, where one damaged file would raise for all steps.
    """

    keep: int
    val_losses: dict[int, float | None]

    def should_preserve(self, checkpoints: list, *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        evaluated = [step for step in steps if self.val_losses.get(step) is not None]
        best = min(evaluated, key=lambda step: (self.val_losses[step], -step), default=None)
        return [step == best or step in steps[-self.keep :] for step in steps]


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turns the errors of damaged files into _Unreadable, on every process where one process met them."""
    damage = None
    try:
        yield
    except Exception as error:
        damage = error.__cause__ or error  # the storage layer's error, where Orbax wraps it in one of its own
        if isinstance(damage, _NOT_DAMAGE) or any(text in str(damage) for text in _NOT_DAMAGE_TEXTS):
            raise
    if multihost_utils.process_allgather(np.array(damage is not None)).any():
        raise _Unreadable(_brief(damage) if damage else "another process cannot read it") from damage


def _save_args(array: jax.Array) -> ocp.SaveArgs:
    """A layer of a stack becomes a chunk of its own, to be read without the others; a row of a matrix is too small for one."""
    row_shape = array.sharding.shard_shape(array.shape)[1:]
    is_stack = math.prod(row_shape) * array.dtype.itemsize >= _MIN_CHUNK_BYTES
    return ocp.SaveArgs(shard_axes=(0,) if is_stack else ())


def _leaf_types(state: PyTree) -> dict[str, str]:
    """Leaf name -> dtype and shape, such as "float32[4, 8]", in the order of the pytree; the leaves may be abstract."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _checksums(state: PyTree) -> dict[str, int]:
    checksums = [_checksum(leaf) for leaf in jax.tree.leaves(state)]
    return dict(zip(_leaf_types(state), (int(checksum) for checksum in checksums), strict=True))


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """A uint32: the sum, modulo 2**32, of each element's bits times an odd number made of its index.

    Addition has no order, so the sharding does not matter; the odd factor makes each change of one element count, and most swaps.
    """
    assert array.dtype.itemsize in (1, 2, 4) and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key), array.dtype
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = array.astype(unsigned) if array.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(array, unsigned)
    index = jnp.zeros(array.shape, jnp.uint32)
    for dim, size in enumerate(array.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def _require_same_leaves(step: int, saved: dict[str, str], abstract_state: PyTree) -> None:
    """Raises UserError naming the first leaf that the checkpoint and the model do not share."""
    wanted = _leaf_types(abstract_state)
    for name in [*wanted, *saved]:
        have, want = saved.get(name, "absent"), wanted.get(name, "absent")
        if have != want:
            raise UserError(
                f"the checkpoint of step {step} does not fit this model: {name} is {have} in the checkpoint and {want} in the"
                " model; use the config that it was saved with, or another workdir"
            )


def _sealed(record: dict) -> dict:
    """The record as JSON gives it back, and a checksum of its text."""
    text = json.dumps(record, sort_keys=True)
    return {"record": json.loads(text), "crc32": zlib.crc32(text.encode())}


def _brief(error: BaseException) -> str:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(first_line, width=120, placeholder="...")


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr)


@functools.cache
def _report_each_error_once() -> None:
    """Silences the echoes of errors that Orbax also raises: its log of them, and the reads in flight when one of them failed."""
    report = sys.unraisablehook

    def is_news(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname + record.getMessage()

    def report_news(unraisable: Any) -> None:
        source = getattr(getattr(unraisable.object, "cr_code", None), "co_filename", "")
        if "orbax" not in source and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    logging.getLogger("absl").addFilter(is_news)
    logging.getLogger("asyncio").addFilter(is_news)
    sys.unraisablehook = report_news
