"""Checkpoints of a training run: what is in one, when it is trusted, which are kept. The loop decides when to save.

Orbax (`CheckpointManager`) writes: each process its own shards, in the background, into a temporary directory that is renamed
when complete, so that a crash leaves at most a half-written directory, never listed as a step. It reads any array onto any
sharding and deletes the steps that our preservation policy gives up. We add:
- a record (JSON, with its own checksum) beside the state: run config, data position, validation loss, and for every leaf its type
  and a checksum that does not depend on sharding, computed on the devices before saving and compared after restoring;
- falling back: a checkpoint that cannot be read, or whose leaves differ from their checksums, is set aside and the one before
  is used, while a state that does not fit the model is the user's error and touches nothing;
- reading back: a save counts, and makes older checkpoints go, once its record and the index of its arrays were read (`read_back.py`);
- errors that name the disk, not the library, and a limit to every wait for another process (`orbax_storage.TIME_LIMIT_S`).
Checksums find what changed; they do not repair. Bytes that no array needs (padding, the library's notes) may change unseen.
What FSDP shards has no second copy whose checksum could be compared with it: a device that computes wrongly shows when a step is
computed twice, not here.
"""

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from herd_jax.errors import FailedAlone, Miscomputed, UserError
from herd_jax.training.checkpoints import orbax_storage
from herd_jax.training.checkpoints.checksums import checksums, held_here, leaf_types, sealed
from herd_jax.training.checkpoints.orbax_storage import Unreadable
from herd_jax.training.checkpoints.read_back import require_readable

PyTree = Any
PATTERN_SIGNS = frozenset("[*?")  # Orbax looks for its files with glob(), and would miss them or find others'


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often a run is saved, and what is kept."""

    every_steps: int = 100  # steps between two checkpoints
    keep: int = 3  # newest checkpoints kept; so is the one with the lowest validation loss of those saved at a step that is evaluated too
    local_directory: str = ""  # on each host's own fast disk or memory (/dev/shm); empty: none
    local_every_steps: int = 10  # steps between two local checkpoints

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "local_every_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name} is {getattr(self, name)}: set it to 1 or more")

    def is_due(self, step: int) -> bool:
        """Returns whether a checkpoint of the step is saved, in the durable directory or locally."""
        return self.is_durable(step) or bool(self.local_directory) and step % self.local_every_steps == 0

    def is_durable(self, step: int) -> bool:
        return step % self.every_steps == 0


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: `state` on the shardings that were asked for, `config` and `position` as they were saved."""

    step: int
    state: PyTree
    config: dict
    position: dict


class SaveFailed(UserError):
    """A checkpoint could not be written; `what` says where and why. The next save may succeed."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: mend that and give the same command again; the earlier checkpoints are intact")
        self.what = what


class Checkpointer:
    """The checkpoints under `directory`: the `keep` newest and the one with the lowest validation loss.

    In a run of several processes each of them makes the same calls; the directory is on a file system that they share, or, where
    it is `private`, one of each process, with what its own devices hold. A reader (inference) may open the directory of a run that
    is still training: nothing is deleted before the first save.
    """

    def __init__(self, directory: str | os.PathLike, keep: int, private: bool = False) -> None:
        self.directory = Path(directory).absolute()
        if pattern := PATTERN_SIGNS.intersection(str(self.directory)):
            signs = " ".join(sorted(pattern))
            raise UserError(f"{self.directory} has {signs} in it, which Orbax, the checkpoints' library, takes for a pattern: choose another path")
        self.private = private
        orbax_storage.report_each_error_once()
        self._policy = orbax_storage.NewestAndBest(self.directory, keep)
        self._manager = orbax_storage.make_manager(self.directory, private, self._policy, self._note_written)
        self._is_prepared = False
        self._step = 0  # of the last save
        self.is_saving = False

    def save(self, step: int, state: PyTree, config: dict, position: dict, val_loss: float | None = None) -> None:
        """Starts saving `state` (jax.Array leaves) and returns once it is copied: the arrays may be donated at once.

        `config` and `position` are json-able. Waits for a save still under way. Raises SaveFailed where that one, or this one,
        cannot be written; the earlier checkpoints are then intact.
        """
        self.wait()  # before the checksums, which wait for all: so no process begins a save before all have finished the last one
        val_loss = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        record = {"config": config, "position": position, "val_loss": val_loss}
        record |= {"leaves": leaf_types(state), "checksums": checksums(state), "held": held_here(state) if self.private else None}
        with self._writing():
            if not self._is_prepared:
                self._prepare_directory()
            orbax_storage.require_room(self.directory, state, self.private)
            self._step = step
            self._policy.val_losses[step] = val_loss
            self._policy.sizes.pop(step, None)
            state_args = orbax_storage.state_to_save(state, self.private)
            self.is_saving = True
            self._manager.save(step, args=ocp.args.Composite(state=state_args, record=ocp.args.JsonSave(sealed(record))), force=True)

    def steps(self) -> list[int]:
        """Returns the steps whose checkpoints are completely written (by all processes, where they are private), oldest first."""
        steps = sorted(ocp.path.step.checkpoint_steps(self.directory))
        return orbax_storage.on_every_process(steps) if self.private else steps

    def config(self) -> dict | None:
        """Returns the run config stored with the newest checkpoint whose record is readable; None where there is none."""
        newest = self.newest()
        return newest and newest[1]["config"]

    def newest(self) -> tuple[Path, dict] | None:
        """Returns, of the newest checkpoint whose record is readable, the directory in which Orbax has its state, and the record."""
        return newest_record([self])

    def restore(self, abstract_state: PyTree) -> Restored | None:
        """Reads the newest readable checkpoint onto the shardings of `abstract_state` (leaves: ShapeDtypeStruct with sharding).

        Returns None where there is no checkpoint. Damaged ones newer than the one returned are renamed to `DIRECTORY.corrupt-STEP`, with a
        warning each. Raises UserError where none is readable (then nothing is renamed) or where the saved state has other leaves,
        shapes or dtypes than `abstract_state`.
        """
        return restore_newest([self], abstract_state)

    def wait(self) -> None:
        """Returns when no save is under way; raises SaveFailed where the last one could not be written."""
        if self.is_saving:
            with self._writing():
                self._manager.wait_until_finished()
            self.is_saving = False

    def close(self) -> None:
        """Waits for this process's part of a save, then releases the background threads; raises SaveFailed as `wait` does.

        It does not wait for other processes: where an error ended this one, they may never come.
        """
        try:
            with self._writing(alone=True):
                self._manager.wait_until_finished()
        finally:
            self.is_saving = False
            self._manager.close()  # does not raise again what was raised

    def read(self, step: int, abstract_state: PyTree) -> Restored:
        """Returns the checkpoint of `step`, verified. Raises Unreadable where it is damaged; all processes find the same."""
        record = self.read_record(step)
        if orbax_storage.on_any(self.private and record["held"] != held_here(abstract_state), "reading a checkpoint"):
            raise Unreadable("other parts of the state belonged to this process")
        _require_same_leaves(step, record["leaves"], abstract_state)
        with self._reading(step):
            state_args = orbax_storage.state_to_restore(abstract_state, self.private)
            state = self._manager.restore(step, args=ocp.args.Composite(state=state_args)).state
        try:
            found = checksums(state)
        except Miscomputed as error:  # it was saved so, by a process whose own copy was wrong
            raise Unreadable("its copies of the same data are not alike") from error
        wrong = next((name for name, checksum in found.items() if checksum != record["checksums"][name]), None)
        if orbax_storage.on_any(wrong is not None, "verifying a checkpoint"):  # of what all hold, one alone may have a wrong copy
            raise Unreadable(f"the data of {wrong} changed since it was saved" if wrong else "another process read data that changed")
        return Restored(step, state, record["config"], record["position"])

    def read_record(self, step: int) -> dict:
        """Returns what is stored beside the state of `step`. Raises Unreadable where that is damaged."""
        with self._reading(step):
            stored = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
            if sealed(stored["record"]) != stored:
                raise ValueError("its record changed since it was saved")
            return stored["record"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Raises Unreadable on all processes, or FailedAlone on those that cannot read while others wait for them."""
        try:
            with orbax_storage.reading(self.private):
                yield
        except orbax_storage.UnreadableHere as error:
            if min(ocp.path.step.checkpoint_steps(self.directory), default=step) == step:
                remedy = "bring back a good copy, or move the directory away to start anew"
                raise UserError(f"no checkpoint in {self.directory} is readable (step {step}: {error}): {remedy}") from error
            self._move_aside(step)
            raise FailedAlone(
                f"the checkpoint of step {step} is unreadable ({error}) and only this process found out: it is set aside, and the same command "
                "continues with the one before"
            ) from error

    def set_aside(self, step: int) -> str:
        """Renames the step's directory, or deletes it where it is private; says which. The same step can be saved again."""
        orbax_storage.wait_for_all("setting a checkpoint aside")
        done = self._move_aside(step, moves=jax.process_index() == 0)
        orbax_storage.wait_for_all("setting a checkpoint aside")
        self._manager.reload()
        return done

    def _move_aside(self, step: int, moves: bool = True) -> str:
        aside = self.directory.with_name(f"{self.directory.name}.corrupt-{step}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}.again")
        with contextlib.suppress(FileNotFoundError):  # another process was first
            if self.private:
                shutil.rmtree(self.directory / str(step))
            elif moves:
                shutil.move(self.directory / str(step), aside)  # which may be on another disk
        return "deleted" if self.private else f"moved to {aside}"

    def delete_after(self, step: int) -> None:
        """Deletes this process's private checkpoints of later steps, which the run is going to take anew."""
        assert self.private
        for later in (later for later in ocp.path.step.checkpoint_steps(self.directory) if later > step):
            shutil.rmtree(self.directory / str(later))
        self._manager.reload()

    def _note_written(self) -> None:
        """Is called in the background before the checkpoint gets its name; where it raises, nothing older is deleted."""
        require_readable(self._policy.note_written(self._step), self.private)

    def _prepare_directory(self) -> None:
        """Makes the directory, removes interrupted saves, reads which earlier step is the best."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.private or jax.process_index() == 0:
            for path in self.directory.glob(f"*{orbax_storage.TEMPORARY}*"):
                shutil.rmtree(path)
        for step in self.steps():
            if step not in self._policy.sizes:
                self._policy.note_written(step)
            with contextlib.suppress(Unreadable):  # then it is never the best
                self._policy.val_losses[step] = self.read_record(step)["val_loss"]
        self._is_prepared = True

    @contextlib.contextmanager
    def _writing(self, alone: bool = False) -> Iterator[None]:
        """Turns the disk's errors, of this save or of the one in the background, into SaveFailed, on every process (or `alone`), or into
        FailedAlone where the others do not come, since they wait in Orbax for what this one did not write."""
        failure = None
        try:
            with orbax_storage.within_time("saving a checkpoint"):
                yield
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) and "os_error_code" not in str(error):
                raise
            failure = error
        try:
            failed = failure if alone else orbax_storage.on_any(failure is not None, "saving a checkpoint", orbax_storage.ALONE_S if failure else None)
        except UserError:
            if failure is None:
                raise
            raise FailedAlone(
                f"cannot write a checkpoint in {self.directory} ({_reason(failure)}) and the other processes wait for this one: the same "
                "command continues with the one before"
            ) from failure
        if not failed:
            return
        self.is_saving = False
        self._manager.reload()  # forget the failed step, remember those that its success would have deleted
        self._is_prepared = False  # what it wrote is in the way of the next one
        raise SaveFailed(f"cannot write a checkpoint in {self.directory} ({_reason(failure)})") from failure


def newest_record(checkpointers: Sequence[Checkpointer]) -> tuple[Path, dict] | None:
    """Returns, of the newest checkpoint of all whose record is readable, the directory in which Orbax has its state, and the record."""
    for step, checkpointer in _newest_first(checkpointers):
        with contextlib.suppress(Unreadable):  # restore_newest() names it and sets it aside
            return checkpointer.directory / str(step) / "state", checkpointer.read_record(step)
    return None


def restore_newest(checkpointers: Sequence[Checkpointer], abstract_state: PyTree, last_step: float = math.inf) -> Restored | None:
    """Does what `Checkpointer.restore` does, with the checkpoints of several that are not after `last_step`.

    A step that more than one of them has is read from the first of these. Private checkpoints that cannot be used never end a run that has
    lost nothing else: without others, it starts anew (None).
    """
    candidates = [(step, checkpointer) for step, checkpointer in _newest_first(checkpointers) if step <= last_step]
    for checkpointer in checkpointers:
        for path in sorted(checkpointer.directory.glob(f"*{orbax_storage.TEMPORARY}*")):
            step = path.name.split(".")[0]
            orbax_storage.warn(f"the checkpoint of step {step} is half-written (its save did not finish): it is ignored")
    restored, damaged = None, []
    for step, checkpointer in candidates:
        try:
            restored = checkpointer.read(step, abstract_state)
            break
        except Unreadable as error:
            damaged.append((step, checkpointer, str(error)))
    if restored is None:
        for step, checkpointer, reason in damaged:
            if not checkpointer.private:
                remedy = "bring back a good copy, or move the directory away to start anew"
                raise UserError(f"no checkpoint in {checkpointer.directory} is readable (step {step}: {reason}): {remedy}")
    for step, checkpointer, reason in damaged:
        done = checkpointer.set_aside(step)
        instead = f"using step {restored.step}" if restored else "starting anew"
        orbax_storage.warn(f"the checkpoint of step {step} is unreadable ({reason}): {done}, {instead}")
    return restored


def _newest_first(checkpointers: Sequence[Checkpointer]) -> list[tuple[int, Checkpointer]]:
    for checkpointer in checkpointers:
        checkpointer.wait()
    found = [(step, checkpointer) for checkpointer in checkpointers for step in checkpointer.steps()]
    return sorted(found, key=lambda pair: -pair[0])  # stable


def _require_same_leaves(step: int, saved: dict[str, str], abstract_state: PyTree) -> None:
    """Raises UserError naming the first leaf that the checkpoint and the model do not share."""
    wanted = leaf_types(abstract_state)
    for name in [*wanted, *saved]:
        have, want = saved.get(name, "absent"), wanted.get(name, "absent")
        if have != want:
            raise UserError(
                f"the checkpoint of step {step} does not fit this model: {name} is {have} in the checkpoint and {want} in the"
                " model; use the config that it was saved with, or another workdir"
            )


def _reason(failure: BaseException | None) -> str:
    if failure is None:
        return "another process could not"
    if isinstance(failure, TimeoutError):
        return f"it took longer than {orbax_storage.TIME_LIMIT_S} s, or another process did not finish"
    if "No space left" in str(failure) or "quota exceeded" in str(failure):
        return "no space is left"
    return orbax_storage.brief(failure)
