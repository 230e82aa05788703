"""Interruptions of a run and what they cost (section 3.3.4 of the paper, Table 5).

The paper gives how often its run was interrupted and why. It does not say how often it saved, nor how long a save, a detection or a
restart took: those constants are ours, each with its reason.

A run is a sequence of interruptions. After each comes the time until it is found, a restart from the last checkpoint written, and training
in cycles of one checkpoint interval and one save; what was not yet written when the next failure comes is lost. As the interruptions do
not depend on the checkpoint interval, all intervals can be tried on the same ones.
"""

import dataclasses
import math

import numpy as np

from herd_jax.errors import UserError

PAPER_GPUS, PAPER_DAYS, PAPER_PLANNED = 16_384, 54, 47
DAY = 86_400  # seconds


@dataclasses.dataclass(frozen=True)
class Cause:
    """A row of Table 5; `symptom` (how it shows) and `replaces_host` (a spare must take its place) are our reading of it."""

    component: str
    category: str
    count: int
    symptom: str = "crash"  # crash: an error is raised | hang: peers wait until a time-out | silent: results are wrong
    replaces_host: bool = True


CAUSES = (
    Cause("Faulty GPU", "GPU", 148),
    Cause("GPU HBM3 memory", "GPU", 72),
    Cause("Software bug", "Dependency", 54, replaces_host=False),
    Cause("Network switch/cable", "Network", 35, "hang", replaces_host=False),
    Cause("Host maintenance", "Unplanned maintenance", 32),
    Cause("GPU SRAM memory", "GPU", 19),
    Cause("GPU system processor", "GPU", 17),
    Cause("NIC", "Host", 7, "hang"),
    Cause("NCCL watchdog timeouts", "Unknown", 7, "hang", replaces_host=False),
    Cause("Silent data corruption", "GPU", 6, "silent"),
    Cause("GPU thermal interface + sensor", "GPU", 6),
    Cause("SSD", "Host", 3),
    Cause("Power supply", "Host", 3),
    Cause("Server chassis", "Host", 2),
    Cause("IO expansion board", "Host", 2),
    Cause("Dependency", "Dependency", 2, replaces_host=False),
    Cause("CPU", "Host", 2),
    Cause("System memory", "Host", 2),
)
CATEGORIES = tuple(dict.fromkeys(cause.category for cause in CAUSES))
SHARES = np.array([cause.count for cause in CAUSES]) / sum(cause.count for cause in CAUSES)
FAILURES_PER_GPU_SECOND = sum(cause.count for cause in CAUSES) / (PAPER_GPUS * PAPER_DAYS * DAY)
PLANNED_PERIOD_S = PAPER_DAYS * DAY / PAPER_PLANNED  # of a job, of whatever size


def _constant(default: float, why: str):
    return dataclasses.field(default=default, metadata={"why": why})


@dataclasses.dataclass(frozen=True)
class GoodputConfig:
    """Constants in seconds. They are ours, not the paper's, and the same at every number of GPUs."""

    checkpoint_interval_s: float = _constant(300, "of training between saves; near the best at 16,384 GPUs")
    save_stall_s: float = _constant(3, "half a step: reach a barrier, copy to host memory; the rest is asynchronous")
    save_write_s: float = _constant(10, "until a save counts: 405B x 12 bytes at 2 TB/s take 2.4 s; the rest is bursts, commit")
    crash_detection_s: float = _constant(30, "an error is raised or a heartbeat stops")
    hang_detection_s: float = _constant(300, "a collective's time-out; half of PyTorch's default of 10 minutes")
    silent_detection_s: float = _constant(3600, "until loss or a check shows corruption; training meanwhile is void")
    restart_s: float = _constant(180, "stop and reschedule 60, processes and communicators 60, restore 30, first step 30")
    replace_host_s: float = _constant(120, "more, where a checked spare host must take a faulty one's place")
    planned_s: float = _constant(900, "maintenance, saved before: update and reboot; then a restart")

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"goodput.{name} is {value}: it must be 0 seconds or more")
        for name in ("checkpoint_interval_s", "save_stall_s"):
            if getattr(self, name) == 0:
                raise UserError(f"goodput.{name} is 0: it must be more than 0 seconds")
        if self.checkpoint_interval_s < self.save_write_s:
            raise UserError(
                f"goodput.checkpoint_interval_s is {self.checkpoint_interval_s:g} and goodput.save_write_s {self.save_write_s:g}: "
                f"the next save would begin before one is written, so set an interval of {self.save_write_s:g} or more"
            )

    @property
    def detection_s(self) -> np.ndarray:
        """Returns, by cause, the time until an interruption is found."""
        return np.array([getattr(self, f"{cause.symptom}_detection_s") for cause in CAUSES], float)

    @property
    def repair_s(self) -> np.ndarray:
        """Returns, by cause, the time of the restart, and of the replacement of the host where there is one."""
        return np.array([self.restart_s + self.replace_host_s * cause.replaces_host for cause in CAUSES], float)


def time_between_failures(num_gpus: int) -> float:
    """Returns the mean seconds between unexpected interruptions, at the paper's rate for each GPU."""
    return 1 / (FAILURES_PER_GPU_SECOND * num_gpus)


def young(save_stall_s: float, between_failures_s: float) -> float:
    """Returns the best seconds of training between saves by Young, "A first order approximation to the optimum checkpoint interval" (1974)."""
    return math.sqrt(2 * save_stall_s * between_failures_s)


def daly(save_stall_s: float, between_failures_s: float) -> float:
    """Returns the best seconds of training between saves by Daly, "A higher order estimate of the optimum checkpoint interval for restart
    dumps" (2006)."""
    ratio = save_stall_s / (2 * between_failures_s)
    if ratio >= 1:
        return between_failures_s
    return young(save_stall_s, between_failures_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_stall_s


def expected(num_gpus: int, config: GoodputConfig) -> float:
    """Returns the effective fraction to expect, from a formula: Daly's model, with causes that differ and saves that count only once written.

    A cycle of training counts if nothing undetected is left from before it, no failure comes during the restart, and none until its save
    is written. The formula is exact for exponential waits where all causes cost the same and nothing is planned; else it is right to
    first order in these.
    """
    rate = 1 / time_between_failures(num_gpus)
    cycle = config.checkpoint_interval_s + config.save_stall_s
    survives_restart = SHARES @ np.exp(-rate * config.repair_s)
    survives = np.exp(-rate * (SHARES @ config.detection_s + cycle + config.save_write_s)) * survives_restart
    unplanned = max(0.0, 1 - (config.planned_s + config.restart_s) / PLANNED_PERIOD_S)
    return float(unplanned * survives * rate * config.checkpoint_interval_s / -np.expm1(-rate * cycle))


@dataclasses.dataclass(frozen=True)
class Interruptions:
    """A run cut where it is interrupted: arrays [n + 1], a span for its start and one for each interruption."""

    PLANNED, START = -1, -2

    start_s: np.ndarray
    length_s: np.ndarray
    cause: np.ndarray  # with which the span begins: index of CAUSES, PLANNED or START

    @classmethod
    def draw(cls, num_gpus: int, seconds: float, rng: np.random.Generator) -> "Interruptions":
        """Draws failures at random, at the paper's rate for each GPU, and planned interruptions evenly, as often as the paper's job had them."""
        failures = rng.uniform(0, seconds, rng.poisson(seconds / time_between_failures(num_gpus)))
        planned = np.arange(rng.uniform(0, PLANNED_PERIOD_S), seconds, PLANNED_PERIOD_S)
        start = np.concatenate([[0.0], failures, planned])
        cause = np.concatenate([[cls.START], rng.choice(len(CAUSES), len(failures), p=SHARES), np.full(len(planned), cls.PLANNED)])
        order = np.argsort(start, kind="stable")
        return cls(start[order], np.diff(start[order], append=seconds), cause[order])

    def spend(self, config: GoodputConfig, intervals_s: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the seconds by what they went to, for each checkpoint interval: arrays [len(intervals_s)] that sum to the length of the run.

        A failure is not mended before all earlier ones are found: corruption that nobody has seen yet outlives a crash, since the
        checkpoint that is restored has it too. A failure during a restart makes it start again.
        """
        planned, failed = self.cause == self.PLANNED, self.cause >= 0
        detection = np.select([failed, planned], [config.detection_s[self.cause], config.planned_s], 0)
        repair = np.select([failed, planned], [config.repair_s[self.cause], config.restart_s], 0)
        found = np.maximum.accumulate(self.start_s + detection) - self.start_s
        finding_s = np.minimum(found, self.length_s)
        repairing_s = np.minimum(repair, self.length_s - finding_s)
        up_s = self.length_s - finding_s - repairing_s
        down = {
            "detection": finding_s[failed].sum(),
            "restart": repairing_s[failed].sum(),
            "planned": (finding_s + repairing_s)[planned].sum(),
        }
        up_s, ends_in_failure = up_s[up_s > 0], np.append(failed[1:], False)[up_s > 0]
        rows = [_train(up_s, ends_in_failure, interval, config) for interval in intervals_s]
        trained = dict(zip(("effective", "save stalls", "lost work"), np.array(rows).T))
        return trained | {name: np.full(len(intervals_s), seconds) for name, seconds in down.items()}


def _train(up_s: np.ndarray, ends_in_failure: np.ndarray, interval_s: float, config: GoodputConfig) -> tuple[float, float, float]:
    """Returns the seconds kept, stalled by saves, and lost, in spans of training and saving."""
    cycle = interval_s + config.save_stall_s
    saves, rest = np.divmod(up_s, cycle)
    worked = saves * interval_s + np.minimum(rest, interval_s)
    written = np.floor_divide(np.maximum(up_s - config.save_write_s, 0), cycle) * interval_s
    kept = np.where(ends_in_failure, written, worked)
    return kept.sum(), (up_s - worked).sum(), (worked - kept).sum()
