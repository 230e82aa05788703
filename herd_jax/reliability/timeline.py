"""What a process is doing and has done: a sequence of activities without gaps. The watchdog looks at it; process 0 keeps it in the workdir.

`WORKDIR/goodput.jsonl` is only appended to, a line every few seconds: when it was written ("time"), what the seconds since the line
before went to ("seconds", by activity), and the steps that were done before and after them ("from", "to"). The first line of each start of
the run also has when that was ("start"). `reliability.goodput` adds it up over all starts; one that failed before it had a state left no line.
"""

import collections
import dataclasses
import json
import statistics
import threading
import time
from pathlib import Path

import jax

from herd_jax.errors import UserError
from herd_jax.reliability.appender import Appender
from herd_jax.reliability.workdir import TIMELINE, stage_directories

ACTIVITIES = ("init", "compile", "step", "input wait", "evaluation", "checkpoint stall", "verification", "hang")
STEPPING = ("step", "input wait")  # activities that alternate with every step
NUM_KEPT_SPANS, NUM_KEPT_STEPS = 200, 101
_SECONDS_BETWEEN_LINES = 5


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of time in one activity: `start` in seconds since the epoch; `step` is the number of steps done when it began."""

    activity: str
    step: int
    start: float
    seconds: float


def timelines(workdir: Path) -> list[Path]:
    """Returns where a run writes its timeline: its workdir, or that of each stage which has begun, in order."""
    return [directory / TIMELINE for directory in stage_directories(workdir) or [workdir]]


class Timeline:
    """Records what a run spends its time on. It is made in the activity "init", which began at `start` (seconds since the epoch): with a start of
    the run, or (begins=False) later."""

    def __init__(self, workdir: Path, start: float, begins: bool = True) -> None:
        self.activity, self.step = "init", 0
        self.spans: collections.deque[Span] = collections.deque(maxlen=NUM_KEPT_SPANS)
        self.step_seconds: collections.deque[float] = collections.deque(maxlen=NUM_KEPT_STEPS)
        self.num_moves = 0  # signs of life; the watchdog sees whether there are new ones
        self._path, self._file = workdir / TIMELINE, None
        self.birth = self._start = self._written = start
        self._wall, self._monotonic = time.time(), time.monotonic()
        self._line: dict = {"start": start} if begins else {}
        self._seconds: dict[str, float] = {}
        self._stepped = 0.0  # seconds of steps, since it was made
        self._first_step = 0
        self._lock = threading.Lock()  # the watchdog writes the last line of a process that hangs

    def now(self) -> float:
        """Returns the seconds since the epoch, by a clock that nobody sets while the process lives: what was set forward was not worked."""
        return self._wall + time.monotonic() - self._monotonic

    def begin(self, step: int) -> None:
        """Notes that the run continues after `step` steps: those counted further are done again, and what they took is lost.

        Raises UserError where the file cannot be opened; a full disk costs lines only.
        """
        self.flush()
        self.step = self._first_step = step
        if self._file is None and jax.process_index() == 0:
            try:
                self._file = Appender(self._path)
                if self._path.exists() and not _ends_a_line(self._path):
                    self._file.append(b"\n")  # after a line that a crash tore
            except OSError as error:
                raise UserError(f"cannot write {self._path} ({error.strerror}): mend that and give the same command again") from error

    def enter(self, activity: str, step: int | None = None) -> float:
        """Ends the activity under way and begins the next; returns the seconds that the ended one took."""
        seconds = self._end_span()
        stepping = activity in STEPPING and self.activity in STEPPING
        self.step, self.activity = self.step if step is None else step, activity
        if not stepping or self._start - self._written >= _SECONDS_BETWEEN_LINES:
            self.flush()
        return seconds

    def rename(self, activity: str) -> None:
        """Notes that what is under way turns out to be another activity."""
        self.activity = activity

    def step_done(self, seconds: float | None = None) -> None:
        """Notes that the devices have finished a step, and the seconds it took unless it was compiled in them."""
        self.num_moves += 1
        if seconds is not None:
            self.step_seconds.append(seconds)

    def median_step(self) -> float | None:
        """Returns the median of the newest steps in seconds; None before the second step."""
        return statistics.median(list(self.step_seconds)) if self.step_seconds else None

    def stepped_seconds(self) -> float:
        """Returns the seconds spent on steps since the timeline was made, also on the one under way."""
        return self._stepped + (self.now() - self._start if self.activity == "step" else 0.0)

    def flush(self) -> None:
        """Writes a line of what has not been written."""
        with self._lock:
            if self._file is None or not self._seconds:
                return
            seconds = {activity: round(seconds, 4) for activity, seconds in self._seconds.items()}
            self._line |= {"time": self._start, "seconds": seconds, "from": self._first_step, "to": self.step}
            self._file.append((json.dumps(self._line) + "\n").encode())
            self._line, self._seconds, self._first_step, self._written = {}, {}, self.step, self._start

    def close(self) -> None:
        """Ends the activity under way; nothing is recorded after it."""
        self._end_span()
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end_span(self) -> float:
        now = self.now()
        seconds = max(now - self._start, 0.0)
        self.spans.append(Span(self.activity, self.step, self._start, seconds))
        self._seconds[self.activity] = self._seconds.get(self.activity, 0.0) + seconds
        self._stepped += seconds if self.activity == "step" else 0.0
        self._start = now
        self.num_moves += 1
        return seconds


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        return file.read(1) in (b"", b"\n")
