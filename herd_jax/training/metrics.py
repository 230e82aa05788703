"""Where a run's numbers go: a JSON line for each logged step, TensorBoard, one live line on the console.

What the numbers are, and when they are computed, is the loop's business. Only process 0 writes. A full disk costs lines, not the run.
"""

import json
import math
import os
import socket
import struct
import sys
import time
from pathlib import Path

import jax
from rich.console import Console as Terminal
from rich.live import Live
from rich.text import Text
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from herd_jax.errors import UserError
from herd_jax.reliability.appender import Appender
from herd_jax.reliability.workdir import METRICS, TENSORBOARD


class MetricsWriter:
    """Appends to `WORKDIR/metrics.jsonl` and to an event file of TensorBoard under `WORKDIR/tensorboard`.

    A run that resumes after `resume_step` computes the steps that follow once more: lines of later steps, and a line torn by a
    crash, are dropped first; TensorBoard hides its points of those steps. Raises UserError where the files cannot be opened.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int) -> None:
        self._lines = self._events = None
        self._workdir = Path(workdir)
        if jax.process_index() == 0:
            path, board = self._workdir / METRICS, self._workdir / TENSORBOARD
            try:
                if path.exists():
                    _drop_steps_after(path, resume_step)
                self._lines = Appender(path)
                # Not tensorboardX's writers, which a full disk ends, or makes wait forever.
                name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{resume_step}"
                self._events = Appender(board / name)
            except OSError as error:
                raise UserError(
                    f"cannot write metrics in {self._workdir} ({error.strerror}): mend that and give the same command again;"
                    " what was written before is intact"
                ) from error
            start = Event(step=resume_step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
            self._events.append(_record(Event(wall_time=time.time(), file_version="brain.Event:2")) + _record(start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records the values of a step; one that is not finite becomes null in the line, and no point on TensorBoard."""
        if self._lines is None:
            return
        finite = {name: _finite(value) for name, value in values.items()}
        points = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items() if value is not None]
        self._lines.append((json.dumps({"step": step, **finite}) + "\n").encode())
        self._events.append(_record(Event(step=step, wall_time=time.time(), summary=Summary(value=points))))

    def close(self) -> None:
        """Closes both files."""
        if self._lines is not None:
            self._lines.close()
            self._events.close()


class Console:
    """One live line of progress on a terminal, or a plain line for each logged step where stdout is not one.

    A context manager: the live line stands between enter and exit. Silent on all processes but 0.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._terminal = Terminal(quiet=jax.process_index() != 0, highlight=False, markup=False)
        self._live = Live(console=self._terminal, auto_refresh=False) if self._is_live() else None
        self._start: tuple[int, float] | None = None
        self._val_loss: float | None = None

    def __enter__(self) -> "Console":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows a step: `loss`, `tokens_per_second`, `mfu` (a fraction) and the last `val_loss`, those that there are."""
        self._val_loss = values.get("val_loss", self._val_loss)
        line = self._line(step, {**values, "val_loss": self._val_loss})
        if self._live:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.message(line)

    def message(self, text: str) -> None:
        """Prints a line that stays."""
        self._terminal.print(text, soft_wrap=True)

    def _is_live(self) -> bool:
        return sys.stdout.isatty() and not self._terminal.is_dumb_terminal and not self._terminal.quiet

    def _line(self, step: int, values: dict[str, float | None]) -> str:
        formats = {
            "loss": "loss {:.4f}",
            "val_loss": "val loss {:.4f}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "mfu": "MFU {:.1%}",
        }
        shown = [text.format(values[name]) for name, text in formats.items() if values.get(name) is not None]
        return " | ".join([f"step {step}/{self._num_steps}", *shown, *self._time_left(step)])

    def _time_left(self, step: int) -> list[str]:
        """Returns the time left, by the mean time of the steps after the first one shown, which alone contains the compilation."""
        now = time.monotonic()
        self._start = self._start or (step, now)
        first_step, first_time = self._start
        if step <= first_step:
            return []
        seconds = round((now - first_time) / (step - first_step) * max(self._num_steps - step, 0))
        return [f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"]


def _finite(value: float | None) -> float | None:
    number = value if value is None or isinstance(value, int) else float(value)
    return number if number is not None and math.isfinite(number) else None


def _drop_steps_after(path: Path, resume_step: int) -> None:
    """Truncates the file where a later step, or a line torn by a crash, begins: that takes no room on the disk."""
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    num_kept = next((i for i, step in enumerate(steps) if step is not None and step > resume_step), len(lines))
    while num_kept and steps[num_kept - 1] is None:
        num_kept -= 1
    os.truncate(path, sum(map(len, lines[:num_kept])))


def _step_of(line: bytes) -> float | None:
    """Returns the step of a line of metrics; None for a torn one."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def _record(event: Event) -> bytes:
    """Returns an event as TensorBoard's files have it: length, checksum, event, checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
