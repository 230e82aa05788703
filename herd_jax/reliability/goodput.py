"""Goodput of a run, measured: seconds of steps that counted over all seconds since the run's first start ("effective training time",
section 3.3.4 of the paper), and what the others went to. `herd_jax.planning.goodput` is the forecast.

Read from the lines that `training.timeline` writes. A step that was computed again later, after a restart or a rewind, is lost work;
the time between the last line of one start and the next start is downtime, together with the at most few seconds that were not yet
written; so are the imports of a restarted program.
"""

import contextlib
import dataclasses
import datetime
import json
import math
from pathlib import Path

import jax

from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.page.figure import figure_file
from herd_jax.reliability.timeline import ACTIVITIES, Timeline, timelines

CAUSES = ("productive", "lost work", *(activity for activity in ACTIVITIES if activity != "step"), "downtime")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A stretch from `start` to `end` (seconds since the epoch), spent on `seconds` (by cause); the run then stood at `step`."""

    start: float
    end: float
    step: int
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Goodput:
    """What the time of a run was spent on: `intervals` in order, without gaps; `num_starts`: how often the run was started."""

    intervals: tuple[Interval, ...]
    num_starts: int

    @property
    def wall_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Returns the seconds by cause, in the order of CAUSES."""
        return {cause: sum(interval.seconds.get(cause, 0.0) for interval in self.intervals) for cause in CAUSES}

    @property
    def fraction(self) -> float:
        """Returns productive seconds over all seconds; NaN where there are none."""
        return self.seconds["productive"] / self.wall_seconds if self.wall_seconds else math.nan

    def lines(self) -> list[str]:
        """Returns the table as text."""
        wall = datetime.timedelta(seconds=round(self.wall_seconds))
        steps, seconds = max((interval.step for interval in self.intervals), default=0), self.seconds
        return [
            f"goodput {self.fraction:.1%} of {wall} since the run's first start ({self.num_starts} starts, {steps:,} steps)",
            *(f"  {cause:<17} {seconds[cause]:>12,.1f} s {seconds[cause] / max(self.wall_seconds, 1e-9):>7.1%}" for cause in CAUSES),
        ]


class GoodputSoFar:
    """The fraction of a run that goes on, for its metrics: made where `timeline` has begun at `step`, when all that was before is read.

    After that it costs nothing. Only process 0 knows it.
    """

    def __init__(self, workdir: Path, timeline: Timeline, step: int) -> None:
        self._timeline, self._stepped_before = timeline, timeline.stepped_seconds()
        self._birth, self._productive = timeline.birth, 0.0
        if jax.process_index() == 0:
            with contextlib.suppress(UserError):  # this is the first start
                before = read_goodput(workdir, step)
                self._birth, self._productive = before.intervals[0].start, before.seconds["productive"]

    def fraction(self) -> float | None:
        if jax.process_index() != 0:
            return None
        stepped = self._timeline.stepped_seconds() - self._stepped_before
        return (self._productive + stepped) / max(self._timeline.now() - self._birth, 1e-9)


def read_goodput(workdir: str | Path, continued_at: float = math.inf) -> Goodput:
    """Reads the goodput of the run in `workdir`, which may be going on: or from step `continued_at`, after which the steps recorded are lost.

    Raises UserError where nothing is recorded.
    """
    path = timelines(user_path(workdir))[0]
    if not path.exists():
        raise UserError(f"{path} does not exist: name the workdir of a run that was started")
    lines = read_timeline(workdir)
    if not lines:
        raise UserError(f"{path} has no complete line yet: wait for the run to begin")
    intervals: list[Interval] = []
    for line, redone_from in zip(lines, _redone_from(lines, continued_at), strict=True):
        end = line["time"]
        if "start" in line and intervals and line["start"] > intervals[-1].end:
            gap = (intervals[-1].end, line["start"])
            intervals.append(Interval(*gap, line["from"], {"downtime": gap[1] - gap[0]}))
        seconds = {activity: value for activity, value in line["seconds"].items() if activity != "step"}
        stepped, num_steps = line["seconds"].get("step", 0.0), line["to"] - line["from"]
        lost = stepped * min(max(line["to"] - redone_from, 0) / num_steps, 1.0) if num_steps else 0.0
        seconds |= {"productive": stepped - lost, "lost work": lost}
        intervals.append(Interval(end - sum(line["seconds"].values()), end, line["to"], seconds))
    return Goodput(tuple(intervals), sum("start" in line for line in lines))


def read_timeline(workdir: str | Path) -> list[dict]:
    """Returns the complete lines of the run in `workdir`, oldest first; steps are counted over all of its stages."""
    lines, before = [], 0
    for path in timelines(user_path(workdir)):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        stage = [line for line in map(_parse, text.split("\n")) if line]
        lines += [{**line, "from": before + line["from"], "to": before + line["to"]} for line in stage]
        before = max([before, *(line["to"] for line in lines)])
    return lines


def furthest_step(workdir: str | Path) -> int:
    """Returns the highest step that the run in `workdir` has recorded; 0 where it has recorded none."""
    try:
        return max(interval.step for interval in read_goodput(workdir).intervals)
    except UserError:
        return 0


def draw(goodput: Goodput, path: str | Path) -> None:
    """Draws goodput over time, and below it the share of each cause, as a .png or .svg. Raises UserError where it cannot be."""
    with figure_file(path, 9, 5) as figure:
        top, bottom = figure.subplots(2, 1, height_ratios=(3, 1))
        start = goodput.intervals[0].start
        hours, fractions, productive, wall = [], [], 0.0, 0.0
        for interval in goodput.intervals:
            productive += interval.seconds.get("productive", 0.0)
            wall += sum(interval.seconds.values())
            hours.append((interval.end - start) / 3600)
            fractions.append(100 * productive / max(wall, 1e-9))
            if "downtime" in interval.seconds:
                top.axvspan((interval.start - start) / 3600, hours[-1], color="tab:red", alpha=0.3, linewidth=0)
        top.plot(hours, fractions)
        top.set(ylim=(0, 100), xlabel="hours since the first start (downtime in red)", ylabel="goodput so far, %")
        top.set_title(f"Goodput {goodput.fraction:.1%}, {goodput.num_starts} starts")
        top.grid(alpha=0.3)
        left = 0.0
        for index, (cause, seconds) in enumerate(goodput.seconds.items()):
            share = 100 * seconds / max(goodput.wall_seconds, 1e-9)
            bottom.barh(0, share, left=left, color=f"C{index}", label=f"{cause} {share:.1f} %")
            left += share
        bottom.set(xlim=(0, 100), yticks=[], xlabel="% of the time")
        bottom.legend(ncols=5, fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.6))


def _redone_from(lines: list[dict], continued_at: float) -> list[float]:
    """Returns, for each line, the lowest step from which a later line, or the run at last, began: the steps above it are computed again."""
    lowest, found = continued_at, []
    for line in reversed(lines):
        found.append(lowest)
        lowest = min(lowest, line["from"])
    return found[::-1]


def _parse(text: str) -> dict | None:
    """Returns the line; None for one that a crash tore, or that is none of ours."""
    try:
        line = json.loads(text)
        numbers = [line["time"], line["from"], line["to"], line.get("start", 0.0), *line["seconds"].values()]
        return line if all(type(number) in (int, float) for number in numbers) else None
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
