"""How much of a run is training when hardware fails: its "effective training time", useful over elapsed time (section 3.3.4 of the paper).

Simulates a run, and for comparison runs on other numbers of GPUs, each with many checkpoint intervals.
"""

import dataclasses
import math

import numpy as np

from herd_jax.errors import UserError
from herd_jax.page.figure import figure_file
from herd_jax.planning.interruptions import (
    CATEGORIES,
    CAUSES,
    DAY,
    GoodputConfig,
    Interruptions,
    daly,
    expected,
    time_between_failures,
    young,
)

SCALES = (16_384, 32_768, 100_000, 1_000_000)
MOST_FAILURES = 1_000_000  # simulated for one seed, to bound time and memory
HOUR = 3_600  # seconds
NEAR_BEST = 0.001  # an interval counts as good as the best if its effective fraction is at most this much lower


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a number of GPUs attains: effective fractions over checkpoint intervals. `used` is at the configured interval."""

    num_gpus: int
    between_failures_s: float
    young_s: float
    daly_s: float
    expected: float
    used: np.ndarray  # [num_seeds]
    intervals_s: np.ndarray  # [n]
    effective: np.ndarray  # [n, num_seeds]

    @property
    def mean(self) -> np.ndarray:
        return self.effective.mean(axis=1)

    @property
    def best_s(self) -> float:
        """Returns the interval, of those tried, that gives the most effective time."""
        return float(self.intervals_s[np.argmax(self.mean)])

    @property
    def near_best_s(self) -> tuple[float, float]:
        """Returns the shortest and the longest of the intervals that are as good as the best, within NEAR_BEST."""
        near = self.intervals_s[self.mean >= self.mean.max() - NEAR_BEST]
        return float(near[0]), float(near[-1])


@dataclasses.dataclass(frozen=True)
class GoodputReport:
    """A simulated run and how it goes at other numbers of GPUs; arrays are [num_seeds]."""

    num_gpus: int
    days: float
    num_seeds: int
    seed: int
    config: GoodputConfig
    hours: dict[str, np.ndarray]  # what the time went to
    unexpected: dict[str, np.ndarray]  # interruptions by category of Table 5
    planned: np.ndarray  # interruptions
    scales: tuple[Scale, ...]  # ascending, with num_gpus among them

    @property
    def run(self) -> Scale:
        return next(scale for scale in self.scales if scale.num_gpus == self.num_gpus)

    def to_dict(self) -> dict:
        """Returns the report for JSON: fractions of 1, seconds, and hours; means over seeds unless named otherwise."""
        return {
            "num_gpus": self.num_gpus,
            "days": self.days,
            "num_seeds": self.num_seeds,
            "seed": self.seed,
            "constants": dataclasses.asdict(self.config),
            "effective_fraction": _spread(self.run.used),
            "hours": {name: float(hours.mean()) for name, hours in self.hours.items()},
            "interruptions": {
                "unexpected": _spread(sum(self.unexpected.values())),
                "planned": _spread(self.planned),
                "by_category": {name: float(count.mean()) for name, count in self.unexpected.items()},
            },
            "scales": [
                {
                    "num_gpus": scale.num_gpus,
                    "time_between_failures_s": scale.between_failures_s,
                    "effective_fraction": _spread(scale.used),
                    "expected_fraction": scale.expected,
                    "best_interval_s": scale.best_s,
                    "near_best_interval_s": list(scale.near_best_s),
                    "best_effective_fraction": float(scale.mean.max()),
                    "young_interval_s": scale.young_s,
                    "daly_interval_s": scale.daly_s,
                }
                for scale in self.scales
            ],
        }

    def lines(self) -> list[str]:
        """Returns the report as text."""
        run, used, elapsed = self.run, _spread(self.run.used), 24 * self.days
        unexpected = _spread(sum(self.unexpected.values()))
        shortest, longest = run.near_best_s
        used_interval = _duration(self.config.checkpoint_interval_s)
        rows = [
            f"{self.num_gpus:,} GPUs for {self.days:g} days, {self.num_seeds} seeds",
            f"effective training time  {used['mean']:.1%} (standard deviation {used['std']:.1%}, {used['min']:.1%} to {used['max']:.1%}; "
            f"by formula {run.expected:.1%})",
            f"interruptions            {unexpected['mean']:.0f} unexpected (standard deviation {unexpected['std']:.0f}), one in "
            f"{_duration(run.between_failures_s)}; {self.planned.mean():.0f} planned",
            "",
            "where the time went         hours   share",
            *(f"  {name:<20} {hours.mean():>10,.1f} {hours.mean() / elapsed:>7.1%}" for name, hours in self.hours.items()),
            "",
            "unexpected interruptions    count   share",
            *(f"  {name:<22} {n.mean():>8,.1f} {n.mean() / max(unexpected['mean'], 1e-9):>7.1%}" for name, n in self.unexpected.items()),
            "",
            "checkpoint interval      training between two saves",
            f"  used                   {used_interval}",
            f"  best simulated         {_duration(run.best_s)} ({_duration(shortest)} to {_duration(longest)}: "
            f"within {100 * NEAR_BEST:g} points of it)",
            f"  Young 1974             {_duration(run.young_s)}",
            f"  Daly 2006              {_duration(run.daly_s)}",
            "",
            f"{'':>11} {'time between':>13} {'effective':>10} {'':>10} {'best':>10} {'effective':>10}",
            f"{'GPUs':>11} {'failures':>13} {'at ' + used_interval:>10} {'formula':>10} {'interval':>10} {'at best':>10} "
            f"{'Young':>10} {'Daly':>10}",
        ]
        for scale in self.scales:
            rows.append(
                f"{scale.num_gpus:>11,} {_duration(scale.between_failures_s):>13} {scale.used.mean():>10.1%} {scale.expected:>10.1%} "
                f"{_duration(scale.best_s):>10} {scale.mean.max():>10.1%} {_duration(scale.young_s):>10} {_duration(scale.daly_s):>10}"
            )
        rows += ["", "constants, in seconds, the same at every number of GPUs (ours: the paper gives the failures, not these)"]
        for field in dataclasses.fields(self.config):
            rows.append(f"  {field.name:<22} {getattr(self.config, field.name):>5g}  {field.metadata['why']}")
        return rows


def report(num_gpus: int, days: float, num_seeds: int = 20, seed: int = 0, constants: GoodputConfig = GoodputConfig()) -> GoodputReport:
    """Simulates a run of `days` of wall time `num_seeds` times, and for comparison runs on other numbers of GPUs.

    The same `seed` gives the same report. Raises UserError for an impossible number.
    """
    if num_gpus < 1:
        raise UserError(f"gpus is {num_gpus}: it must be 1 or more")
    if not (math.isfinite(days) and days > 0):
        raise UserError(f"days is {days:g}: it must be more than 0")
    if num_seeds < 1:
        raise UserError(f"seeds is {num_seeds}: it must be 1 or more")
    if seed < 0:
        raise UserError(f"seed is {seed}: it must be 0 or more")
    sizes = sorted({num_gpus, *SCALES})
    most_days = MOST_FAILURES * time_between_failures(sizes[-1]) / DAY
    if days > most_days:
        raise UserError(
            f"days is {days:g}: that is more than {MOST_FAILURES:,} failures with {sizes[-1]:,} GPUs, which the report has too; "
            f"simulate {math.floor(most_days * 100) / 100:g} days or fewer"
        )
    runs = {size: [Interruptions.draw(size, days * DAY, np.random.default_rng([seed, i])) for i in range(num_seeds)] for size in sizes}
    spent = [run.spend(constants, np.array([constants.checkpoint_interval_s])) for run in runs[num_gpus]]
    causes = [run.cause for run in runs[num_gpus]]
    category = np.array([CATEGORIES.index(cause.category) for cause in CAUSES])
    counts = np.array([np.bincount(category[cause[cause >= 0]], minlength=len(CATEGORIES)) for cause in causes])
    return GoodputReport(
        num_gpus,
        days,
        num_seeds,
        seed,
        constants,
        hours={name: np.array([seconds[name][0] for seconds in spent]) / HOUR for name in spent[0]},
        unexpected=dict(zip(CATEGORIES, counts.T)),
        planned=np.array([np.count_nonzero(cause == Interruptions.PLANNED) for cause in causes]),
        scales=tuple(_scale(size, days, constants, runs[size]) for size in sizes),
    )


def _scale(num_gpus: int, days: float, config: GoodputConfig, runs: list[Interruptions]) -> Scale:
    """Tries intervals from a tenth to ten times Young's, each 15 % longer than the last, none shorter than the writing of a save."""
    between_s = time_between_failures(num_gpus)
    young_s = young(config.save_stall_s, between_s)
    intervals_s = np.unique(np.maximum(young_s * np.geomspace(0.1, 10, 33), config.save_write_s))
    tried_s = np.append(intervals_s, config.checkpoint_interval_s)
    kept_s = np.array([run.spend(config, tried_s)["effective"] for run in runs]).T
    *effective, used = np.minimum(kept_s / (days * DAY), 1)  # a sum of spans may round to more than the whole
    daly_s = daly(config.save_stall_s, between_s)
    return Scale(num_gpus, between_s, young_s, daly_s, expected(num_gpus, config), used, intervals_s, np.array(effective))


def draw(goodput: GoodputReport, path: str) -> None:
    """Draws effective time over checkpoint interval, a curve for each number of GPUs, to a .png or .svg file.

    Raises UserError where it cannot be made.
    """
    with figure_file(path, 8, 5) as figure:
        axes = figure.add_subplot()
        for scale in goodput.scales:
            minutes, mean, seeds = scale.intervals_s / 60, 100 * scale.mean, 100 * scale.effective
            (curve,) = axes.plot(minutes, mean, label=f"{scale.num_gpus:,} GPUs")
            axes.fill_between(minutes, seeds.min(axis=1), seeds.max(axis=1), color=curve.get_color(), alpha=0.2, linewidth=0)
            for interval_s, marker in ((scale.young_s, "v"), (scale.daly_s, "o")):
                axes.plot(interval_s / 60, np.interp(interval_s / 60, minutes, mean), marker, color=curve.get_color(), fillstyle="none")
        for name, marker in (("Young", "v"), ("Daly", "o")):
            axes.plot([], [], marker, color="black", fillstyle="none", label=name)
        axes.axvline(goodput.config.checkpoint_interval_s / 60, color="gray", linestyle=":", label="interval used")
        axes.set(xscale="log", ylim=(0, 100), xlabel="checkpoint interval, minutes", ylabel="effective training time, %")
        axes.set_title(f"Goodput over {goodput.days:g} days, mean, lowest and highest of {goodput.num_seeds} seeds")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend()


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std()), "min": float(values.min()), "max": float(values.max())}


def _duration(seconds: float) -> str:
    """Returns a time in the largest unit of which there are ten or more, with about three digits."""
    unit, name = next(((unit, name) for unit, name in ((DAY, "d"), (HOUR, "h"), (60, "min")) if seconds >= 10 * unit), (1, "s"))
    return f"{seconds / unit:.{0 if seconds >= 100 * unit else 1}f} {name}"
