"""A thread that ends a process which has stopped moving, so that a supervisor can start the run again, and leaves a flight record behind.

On a hang every process of a run waits in the same collective, and each one's watchdog fires. Which one the others wait for is seen from
`WORKDIR/flight/seen/PROCESS.json`: where each process stood when it last wrote there (every few seconds). It is a file, not a key of
the coordinator, because the coordinator's host may be the one that is gone.
"""

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path

import jax

from herd_jax.errors import HUNG, UserError
from herd_jax.machines.roll_call import AT_LOSS
from herd_jax.reliability.appender import warn_of_loss
from herd_jax.reliability.timeline import STEPPING, Timeline
from herd_jax.reliability.workdir import FLIGHT

_POLL_SECONDS, _SEEN_SECONDS, _DUMP_SECONDS = 1.0, 10.0, 30.0


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """How long a step, and anything else, may take before a run counts as hanging."""

    enabled: bool = True  # whether a run that hangs is ended, with a record of what it did
    factor: float = 10.0  # times the median step that a step may take
    min_seconds: float = 120.0  # that a step may take in any case
    other_seconds: float = 3600.0  # that anything else may take: restoring, compiling, evaluating, saving

    def __post_init__(self):
        if not self.factor > 1:
            raise UserError(f"train.watchdog.factor is {self.factor}: it must be more than 1")
        for name in ("min_seconds", "other_seconds"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"train.watchdog.{name} is {value}: it must be positive (train.watchdog.enabled=false: no watchdog)")


class Watchdog:
    """Watches `timeline` between enter and exit; leaves a flight record also where another process is lost (`herd_jax.machines.roll_call`).

    Time is counted in the thread's own polls, so that a machine that was suspended, or a process that was, is not taken for one that hangs.
    """

    def __init__(self, config: WatchdogConfig, timeline: Timeline, workdir: Path) -> None:
        self._config, self._timeline, self._directory = config, timeline, workdir.absolute() / FLIGHT
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._config.enabled:
            self._thread.start()
            AT_LOSS.append(self._at_loss)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        if self._config.enabled:
            AT_LOSS.remove(self._at_loss)
            self._thread.join()
            with contextlib.suppress(OSError):  # of a directory that could never be made
                self._seen_file.unlink()

    def limit(self) -> float:
        """Returns the seconds that the activity under way may take."""
        median = self._timeline.median_step()
        if self._timeline.activity not in STEPPING or median is None:
            return self._config.other_seconds
        return max(self._config.factor * median, self._config.min_seconds)

    def record(self, reason: str) -> str:
        """Returns the flight record, but for the stacks."""
        timeline, now = self._timeline, time.time()
        lines = [
            f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()} (pid {os.getpid()}), {_clock(now)}",
            f"in activity '{timeline.activity}' after step {timeline.step}: {reason}",
            "",
            "processes, the longest unseen first",
            *self._peers(now),
            "",
            "activities, the newest last: began, seconds, steps done, activity",
            *(f"  {_clock(span.start)} {span.seconds:>10.3f} {span.step:>9} {span.activity}" for span in list(timeline.spans)),
        ]
        return "\n".join(lines) + "\n"

    @property
    def _seen_file(self) -> Path:
        return self._directory / "seen" / f"{jax.process_index()}.json"

    def _watch(self) -> None:
        moves, idle_polls, polls = self._timeline.num_moves, 0, 0
        while not self._stopped.wait(_POLL_SECONDS):
            if polls % round(_SEEN_SECONDS / _POLL_SECONDS) == 0:
                threading.Thread(target=self._write_seen, daemon=True).start()  # a disk that hangs must not stop the watch
            polls += 1
            idle_polls = 0 if self._timeline.num_moves != moves else idle_polls + 1
            moves = self._timeline.num_moves
            if idle_polls * _POLL_SECONDS > self.limit():
                self._end(idle_polls * _POLL_SECONDS)

    def _end(self, waited: float) -> None:
        reason = f"no progress for {waited:.0f} s, and the limit is {self.limit():.0f} s"
        self._leave_record(reason, "hang")
        os._exit(HUNG)

    def _at_loss(self, sentence: str) -> None:
        self._leave_record(sentence, self._timeline.activity)

    def _leave_record(self, reason: str, spent_on: str) -> None:
        """Leaves a flight record; where the disk, or who reads stderr, hangs too, the process ends without one."""
        path = self._directory / f"step-{self._timeline.step}-process-{jax.process_index()}-{int(time.time())}.txt"
        dump = threading.Thread(target=self._dump, args=(path, reason, spent_on), daemon=True)
        dump.start()
        dump.join(_DUMP_SECONDS)

    def _dump(self, path: Path, reason: str, spent_on: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(self.record(reason) + "\nstacks\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"the flight record is {path}"
        except OSError as error:
            where = f"there is no flight record ({error.strerror})"
        print(f"watchdog: {reason}; {where}", file=sys.stderr, flush=True)
        self._timeline.rename(spent_on)
        self._timeline.close()

    def _write_seen(self) -> None:
        timeline = self._timeline
        seen = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "step": timeline.step, "activity": timeline.activity}
        try:
            self._seen_file.parent.mkdir(parents=True, exist_ok=True)
            self._seen_file.write_text(json.dumps(seen))
        except OSError as error:
            warn_of_loss(self._seen_file, error)

    def _peers(self, now: float) -> list[str]:
        seen = []
        for path in (self._directory / "seen").glob("*.json"):
            try:
                peer = {"process": int(path.stem), **json.loads(path.read_text())}
            except ValueError:
                continue  # it is being written
            if peer["process"] < jax.process_count():  # an earlier start may have had more
                seen.append(peer)
        seen.sort(key=lambda peer: peer["time"])
        return [
            f"  process {peer['process']} on {peer['host']} (pid {peer['pid']}): {now - peer['time']:.0f} s ago, "
            f"step {peer['step']}, {peer['activity']}"
            for peer in seen
        ]


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
