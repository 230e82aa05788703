"""A run's checkpoints in two tiers: durable ones that all processes share and, saved more often, fast ones on each host.

A local checkpoint is the parts of the state that one process's devices hold. It is used where every process still has its part of the
same step, on a mesh that divides the state in the same way, and where the checksums of the whole arrays agree; else an older one, or the
durable one. The two newest are kept: a process begins to save only when all have finished the save before, so one is always whole.
"""

import math
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from herd_jax.errors import FailedAlone, UserError
from herd_jax.files import user_path
from herd_jax.training.checkpoints import orbax_storage
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig, Checkpointer, Restored, SaveFailed, newest_record, restore_newest

PyTree = Any
MAX_FAILURES = 3  # durable saves that fail one after the other: the last ends the run
LOCAL_KEEP = 2


class TieredCheckpointer:
    """The checkpoints of the run in `directory`, which all processes share, and those in the local directory of `config`.

    In a run of several processes each of them makes the same calls. A save that fails (a full disk) costs a warning: the next one
    tries again, and only MAX_FAILURES durable ones in succession, or the last of a run, are an error.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self._durable = Checkpointer(directory, config.keep)
        self._local = None
        if config.local_directory:
            self._local = Checkpointer(_local_directory(directory, config), LOCAL_KEEP, private=True)
        self._tiers = [tier for tier in (self._local, self._durable) if tier]  # a step that both have is read from the local one
        self._failures = 0  # durable saves since the last one that was written
        self._last_failure: SaveFailed | None = None  # that no later save has made good

    def save(
        self, step: int, state: PyTree, config: dict, position: dict, val_loss: float | None = None, *, durable: bool = True
    ) -> float:
        """Starts saving `state`, durably or (durable=False) locally, as `Checkpointer.save` does.

        Returns the seconds that training waited: for the save before, the checksums and the copy out of the devices' memory. Raises
        UserError after MAX_FAILURES durable saves in succession that could not be written.
        """
        start = time.perf_counter()
        self.wait()
        tier = self._durable if durable else self._local
        assert tier, "a local save without checkpoint.local_directory"
        try:
            tier.save(step, state, config, position, val_loss)
        except SaveFailed as failed:
            self._go_on(failed, durable)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Returns when no save is under way. Raises as `save` does."""
        for tier in self._tiers:
            was_saving = tier.is_saving
            try:
                tier.wait()
            except SaveFailed as failed:
                self._go_on(failed, tier is self._durable)
            else:
                if was_saving and tier is self._durable:
                    self._failures, self._last_failure = 0, None

    def steps(self) -> list[int]:
        """Returns the steps that can be restored if their files are whole, oldest first."""
        return sorted({step for tier in self._tiers for step in tier.steps()})

    def newest(self) -> tuple[Path, dict] | None:
        """Returns, of the newest checkpoint whose record is readable, the directory in which Orbax has its state, and the record."""
        return newest_record(self._tiers)

    def restore(self, abstract_state: PyTree, last_step: float = math.inf) -> Restored | None:
        """Restores the newest whole checkpoint of both tiers that is not after `last_step`, as `Checkpointer.restore` does; local ones that
        cannot be used are deleted."""
        restored = restore_newest(self._tiers, abstract_state, last_step)
        if self._local:
            self._local.delete_after(restored.step if restored else 0)
        return restored

    def __enter__(self) -> "TieredCheckpointer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except SaveFailed:
            if not isinstance(error, FailedAlone):  # which says it already, and how to go on
                raise

    def close(self) -> None:
        """Waits for this process's part of a save, then releases the background threads. Raises SaveFailed where the last durable
        save could not be written."""
        for tier in self._tiers:
            was_saving = tier.is_saving
            try:
                tier.close()
            except SaveFailed as failed:
                if tier is self._durable:
                    raise
                _report(failed)
            else:
                if was_saving and tier is self._durable:
                    self._last_failure = None
        failure, self._last_failure = self._last_failure, None
        if failure:
            raise failure

    def _go_on(self, failed: SaveFailed, durable: bool) -> None:
        if durable:
            self._failures += 1
            if self._failures == MAX_FAILURES:
                self._last_failure = None
                raise UserError(f"the last {MAX_FAILURES} saves all failed: {failed}") from failed
            self._last_failure = failed
        _report(failed)


def delete_local(directory: Path, config: CheckpointConfig) -> None:
    """Deletes this process's local checkpoints of the run in `directory`, which has come to its end."""
    if config.local_directory:
        shutil.rmtree(_local_directory(directory, config), ignore_errors=True)  # they may be gone


def _local_directory(directory: Path, config: CheckpointConfig) -> Path:
    """Returns the directory of this process's local checkpoints of this run; another run has another one."""
    return user_path(config.local_directory) / f"{_run_id(directory)}-{jax.process_index()}"


def _report(failed: SaveFailed) -> None:
    if failed.__cause__ or jax.process_index() == 0:  # the process where it happened, and the one whose output is read
        print(f"warning: {failed.what}: training goes on, the next save tries again; the earlier checkpoints are intact", file=sys.stderr)


def _run_id(directory: Path) -> str:
    """Returns the run's id, written beside the durable checkpoints when the run begins: moved away to start anew, they leave room for another."""
    digits = np.zeros(16, np.uint8)
    if jax.process_index() == 0:
        path = directory / ".run"
        try:
            if not path.is_file() or path.stat().st_size != digits.size:
                directory.mkdir(parents=True, exist_ok=True)
                path.write_text(secrets.token_hex(digits.size // 2))
            digits = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError as error:
            raise UserError(f"cannot write to {directory} ({orbax_storage.brief(error)}): mend that, or choose another workdir") from error
    orbax_storage.wait_for_all("reading the run's name")
    return np.asarray(multihost_utils.broadcast_one_to_all(digits)).astype(np.uint8).tobytes().decode()
