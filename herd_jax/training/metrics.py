"""Where a run's numbers go: a JSON line a logged step, TensorBoard, one live line on the console.

What the numbers are, and when they are computed, is the loop's business. Only process 0 writes.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console as Terminal
from rich.live import Live
from rich.text import Text
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from herd_jax.errors import UserError


class MetricsWriter:
    """Appends to `WORKDIR/metrics.jsonl` and to an event file of TensorBoard under `WORKDIR/tensorboard`.

    A run that resumes after `resume_step` computes the steps that follow once more: lines of later steps, and a line torn by a
    crash, are dropped first; TensorBoard hides its points of those steps. Raises UserError where the disk refuses.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int) -> None:
        self._lines = self._events = None
        self._workdir = Path(workdir)
        if jax.process_index() == 0:
            with self._writing():
                board = self._workdir / "tensorboard"
                board.mkdir(parents=True, exist_ok=True)
                path = self._workdir / "metrics.jsonl"
                if path.exists():
                    _drop_steps_after(path, resume_step)
                self._lines = path.open("a", encoding="utf-8")
                # Not SummaryWriter: when its thread dies of a full disk, its queue makes the run wait forever.
                self._events = EventsWriter(str(board / "events"), filename_suffix=f".{resume_step}")
                self._events.write_event(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records the values of a step; one that is not finite becomes null in the line, and no point on TensorBoard."""
        if self._lines is None:
            return
        finite = {name: _finite(value) for name, value in values.items()}
        points = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items() if value is not None]
        with self._writing():
            self._lines.write(json.dumps({"step": step, **finite}) + "\n")
            self._lines.flush()
            self._events.write_event(Event(step=step, wall_time=time.time(), summary=Summary(value=points)))
            self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        if self._lines is not None:
            with self._writing():
                self._lines.close()
                self._events.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write metrics in {self._workdir} ({error.strerror}): mend that and give the same command again;"
                " what was written before is intact"
            ) from error


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
        """From the mean time of the steps since the first one shown, which alone knows the compilation."""
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
    """Rewrites the file, atomically, without the lines of later steps and those that a crash tore."""
    kept = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if _step_of(line) <= resume_step]
    rewritten = path.with_name(f"{path.name}.new")
    with rewritten.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    rewritten.replace(path)


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity for a torn one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
