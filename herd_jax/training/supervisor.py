"""Starts the command of a run again until the run is done: after crashes, hangs and preemption, but not after an error of the user.

The supervisor knows of the run what it wrote into its workdir: the steps done and where each start began (`training.timeline`), and when
each process last gave a sign of life (`training.watchdog`). It touches no device. One supervisor may stand over a launcher of many
processes, or one on each host over that host's process.

`WORKDIR/incidents.jsonl` has a line for each incident, once the run has moved again or it is known that it will not: "time" (when the
process ended, seconds since the epoch), "host", "step" (done by then), "cause", "lost_steps" (computed again), "downtime_seconds" (from
the end of the process until the next one takes its first step). The last two are null where the next start did not get that far.
"""

import dataclasses
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from herd_jax.errors import HUNG, PEER_LOST, START_AGAIN, USER_ERROR, UserError
from herd_jax.training.goodput import furthest_step
from herd_jax.training.timeline import FILE

_POLL_SECONDS = 0.5
_SILENT_SECONDS = 120  # a process writes its sign of life every 10
_MOST_WAIT_SECONDS = 300.0
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


@dataclasses.dataclass
class Incident:
    time: float
    host: str
    step: int
    cause: str
    lost_steps: int | None = None
    downtime_seconds: float | None = None


class Supervisor:
    """Runs `command` (of the run in `workdir`) until it ends well, or `give_up_after` times in a row without a step further than before.

    The wait before a restart is `backoff_seconds`, doubled with every failure without progress; none after a preemption.
    """

    def __init__(self, command: list[str], workdir: Path, give_up_after: int = 5, backoff_seconds: float = 5.0) -> None:
        if give_up_after < 1:
            raise UserError(f"give-up-after is {give_up_after}: it must be 1 or more")
        if not backoff_seconds >= 0:
            raise UserError(f"backoff is {backoff_seconds}: it must be 0 seconds or more")
        self._command, self._workdir = command, workdir
        self._give_up_after, self._backoff_seconds = give_up_after, backoff_seconds
        self._told: int | None = None  # the signal that this process was sent
        self._child: subprocess.Popen | None = None
        self.incidents: list[Incident] = []

    def run(self) -> int:
        """The exit status for this process: that of the last start, or 75 (start again) where a signal ended it."""
        numbers = (*_FORWARDED, signal.SIGINT)
        before = {number: signal.signal(number, self._forward) for number in numbers}
        try:
            status = self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for line in table(self.incidents):
            print(line, flush=True)
        return status

    def _run(self) -> int:
        failures, first_step = 0, furthest_step(self._workdir)
        while True:
            reached = furthest_step(self._workdir)
            status, silent = self._start_and_wait()
            if status == 0:
                return 0
            if self._told is not None:
                return START_AGAIN if self._told in _FORWARDED else status
            step = furthest_step(self._workdir)
            if status == USER_ERROR and step == first_step and not self.incidents:
                return status  # it said why
            cause = _cause(status, silent)
            self._note(Incident(time.time(), socket.gethostname(), step, cause))
            failures = 0 if step > reached or status == START_AGAIN else failures + 1
            if failures == self._give_up_after:
                self._settle()
                in_a_row = f"{failures} failures in a row without a step beyond {step} (the last: {cause})"
                print(f"supervise: {in_a_row}: giving up", file=sys.stderr, flush=True)
                return status
            wait = 0.0 if status == START_AGAIN else min(self._backoff_seconds * 2 ** max(failures - 1, 0), _MOST_WAIT_SECONDS)
            print(f"supervise: {cause} after step {step}; starting again in {wait:g} s", file=sys.stderr, flush=True)
            self._sleep(wait)
            if self._told is not None:
                self._settle()
                return START_AGAIN if self._told in _FORWARDED else USER_ERROR

    def _start_and_wait(self) -> tuple[int, bool]:
        """(exit status, whether the process was killed for giving no sign of life)."""
        num_lines = len(_lines(self._workdir / FILE))
        self._child = child = subprocess.Popen(self._command)
        if self._told in _FORWARDED:  # it came just before
            child.send_signal(self._told)
        sign, idle_polls, silent = None, 0, False
        while child.poll() is None:
            self._settle(num_lines)
            newest = self._sign_of_life(child.pid)
            idle_polls = idle_polls + 1 if newest is not None and newest == sign else 0
            sign = newest
            if idle_polls * _POLL_SECONDS > _SILENT_SECONDS:
                silent = True
                child.kill()
            self._sleep(_POLL_SECONDS, child)
        self._child = None
        self._settle(num_lines)
        return child.returncode, silent

    def _sleep(self, seconds: float, child: subprocess.Popen | None = None) -> None:
        """Until the time is over, the child has ended or a signal came."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and (child is not None or self._told is None):
            if child is None:
                time.sleep(min(left, _POLL_SECONDS))
                continue
            try:
                child.wait(left)
                return
            except subprocess.TimeoutExpired:
                return

    def _sign_of_life(self, pid: int) -> str | None:
        """What the process with this id on this host last wrote; None where it has not yet, or is a launcher."""
        for text in (_read(path) for path in (self._workdir / "flight" / "seen").glob("*.json")):
            seen = _parse(text)
            if seen and seen.get("pid") == pid and seen.get("host") == socket.gethostname():
                return text
        return None

    def _note(self, incident: Incident) -> None:
        self._settle()
        self.incidents.append(incident)
        self._unsettled = incident

    _unsettled: Incident | None = None

    def _settle(self, num_lines: int | None = None) -> None:
        """Writes the last incident down: where `num_lines` is given, only once the timeline has a step beyond its first so many lines."""
        incident = self._unsettled
        if incident is None:
            return
        if num_lines is not None:
            lines = _lines(self._workdir / FILE)[num_lines:]
            moved = next((line for line in lines if line["to"] > line["from"]), None)
            if moved is None:
                return
            incident.lost_steps = max(incident.step - moved["from"], 0)
            incident.downtime_seconds = round(moved["time"] - sum(moved["seconds"].values()) - incident.time, 2)
        self._unsettled = None
        self._workdir.mkdir(parents=True, exist_ok=True)
        with (self._workdir / "incidents.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(incident)) + "\n")

    def _forward(self, number: int, frame) -> None:
        """To the child; a terminal sends Ctrl-C to both by itself."""
        self._told = number
        if self._child is not None and number in _FORWARDED:
            self._child.send_signal(number)


def table(incidents: list[Incident]) -> list[str]:
    """The incidents as text."""
    if not incidents:
        return ["no incidents"]
    lines = [f"{'time':<19} {'step':>8} {'lost steps':>10} {'downtime':>10}  cause"]
    for incident in incidents:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(incident.time))
        lost = "-" if incident.lost_steps is None else incident.lost_steps
        downtime = "-" if incident.downtime_seconds is None else f"{incident.downtime_seconds:.1f} s"
        lines.append(f"{clock:<19} {incident.step:>8} {lost:>10} {downtime:>10}  {incident.cause}")
    return lines


def _cause(status: int, silent: bool) -> str:
    if silent:
        return f"no sign of life for {_SILENT_SECONDS} s, killed"
    number = -status if status < 0 else status - 128  # a launcher's shell reports a signal as 128 + its number
    if status < 0 or number in set(signal.Signals):
        return f"killed by {signal.Signals(number).name}"
    return {START_AGAIN: "preempted", HUNG: "hang", PEER_LOST: "another process was lost"}.get(status, f"crash (exit status {status})")


def _lines(path: Path) -> list[dict]:
    return [line for line in map(_parse, _read(path).split("\n")) if line and "from" in line]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _parse(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
