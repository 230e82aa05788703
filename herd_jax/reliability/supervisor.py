"""Starts the command of a run again until the run is done: after crashes, hangs and preemption, but not after an error of the user, nor
where a device computes wrongly (`training.corruption`): it would do so again.

The supervisor knows of the run what it wrote into its workdir: the steps done and where each start began (`training.timeline`), and when
each process last gave a sign of life (`training.watchdog`). It touches no device. One supervisor may stand over a launcher of many
processes, or one on each host over that host's process. The command gets a session of its own, so that what it leaves behind on this host
(the processes of a launcher that was killed, one that is stopped) is found, and killed before the next start; this takes Linux.

`WORKDIR/incidents.jsonl` has a line for each incident, once the run has moved again or it is known that it will not: "time" (when the
process ended, seconds since the epoch), "host", "step" (done by then), "cause", "lost_steps" (computed again), "downtime_seconds" (from
the end of the process until the next one takes its first step). The last two are null where the next start did not get that far.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from herd_jax.errors import HUNG, MISCOMPUTED, OCCUPIED, PEER_LOST, START_AGAIN, USER_ERROR, UserError
from herd_jax.reliability.appender import Appender
from herd_jax.reliability.goodput import furthest_step, read_timeline
from herd_jax.reliability.timeline import timelines
from herd_jax.reliability.workdir import FLIGHT, INCIDENTS

_POLL_SECONDS = 2.0
_SILENT_SECONDS = 120  # a process writes its sign of life every 10
_MOST_WAIT_SECONDS = 300.0
_GRACE_SECONDS = 5.0  # for the command's last words
_FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1, signal.SIGHUP: signal.SIGTERM, signal.SIGINT: signal.SIGINT}


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
        self._to_pass_on: list[int] = []  # each once: a second Ctrl-C says more than the first
        self._child: subprocess.Popen | None = None
        self.incidents: list[Incident] = []

    def run(self) -> int:
        """Returns the exit status for this process: that of the last start, or 75 (start again) where a signal ended it."""
        heard = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]  # not SIGHUP under nohup
        before = {number: signal.signal(number, self._forward) for number in heard}
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
                return status if self._told == signal.SIGINT else START_AGAIN
            step = furthest_step(self._workdir)
            if not self.incidents and (status == OCCUPIED or status == USER_ERROR and step == first_step):
                return status  # it said why
            cause = _cause(status, silent)
            self._note(Incident(time.time(), socket.gethostname(), step, cause))
            if status == MISCOMPUTED:
                self._settle()
                return status  # it said what to do
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
                return USER_ERROR if self._told == signal.SIGINT else START_AGAIN

    def _start_and_wait(self) -> tuple[int, bool]:
        """Returns (exit status, whether the processes were killed because one gave no sign of life)."""
        num_lines = len(read_timeline(self._workdir))
        self._child = child = subprocess.Popen(self._command, start_new_session=True)
        self._pass_on()  # what came just before
        signs, idle_polls, silent = {}, {}, False
        while child.poll() is None:
            self._settle(num_lines)
            before, signs = signs, self._signs_of_life(child.pid)
            idle_polls = {key: idle_polls.get(key, 0) + 1 for key, sign in signs.items() if before.get(key) == sign}
            if max(idle_polls.values(), default=0) * _POLL_SECONDS > _SILENT_SECONDS:
                silent = True
                _kill(child.pid)
                child.kill()
            self._sleep(_POLL_SECONDS, child)
        self._child = None
        end = time.monotonic() + _GRACE_SECONDS
        while _members(child.pid) and time.monotonic() < end:
            time.sleep(min(_POLL_SECONDS, 0.1))
        _kill(child.pid)
        self._settle(num_lines)
        return child.returncode, silent

    def _sleep(self, seconds: float, child: subprocess.Popen | None = None) -> None:
        """Waits until the time is over, the child has ended or a signal came."""
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

    def _signs_of_life(self, session: int) -> dict[Path | int, str]:
        """Returns what does not stay as it is while all is well: the last words of each process of the session, and that one of them is
        stopped."""
        members = _members(session)
        signs: dict[Path | int, str] = {pid: state for pid, state in members.items() if state == "T"}
        for path in (path for timeline in timelines(self._workdir) for path in (timeline.parent / FLIGHT / "seen").glob("*.json")):
            text = _read(path)
            seen = _parse(text)
            if seen and seen.get("pid") in (session, *members) and seen.get("host") == socket.gethostname():
                signs[path] = text
        return signs

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
            lines = read_timeline(self._workdir)[num_lines:]
            moved = next((line for line in lines if line["to"] > line["from"]), None)
            if moved is None:
                return
            incident.lost_steps = max(incident.step - moved["from"], 0)
            incident.downtime_seconds = round(moved["time"] - sum(moved["seconds"].values()) - incident.time, 2)
        self._unsettled = None
        file = Appender(self._workdir / INCIDENTS)
        file.append((json.dumps(dataclasses.asdict(incident)) + "\n").encode())
        file.close()

    def _forward(self, number: int, frame) -> None:
        """Sends a signal to the child, which is out of the terminal's reach."""
        self._told = number
        self._to_pass_on.append(_FORWARDED[number])
        self._pass_on()

    def _pass_on(self) -> None:
        while self._child is not None and self._to_pass_on:
            self._child.send_signal(self._to_pass_on.pop(0))


def table(incidents: list[Incident]) -> list[str]:
    """Returns the incidents as text."""
    if not incidents:
        return ["no incidents"]
    lines = [f"{'time':<19} {'step':>8} {'lost steps':>10} {'downtime':>10}  cause"]
    for incident in incidents:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(incident.time))
        lost = "-" if incident.lost_steps is None else incident.lost_steps
        downtime = "-" if incident.downtime_seconds is None else f"{incident.downtime_seconds:.1f} s"
        lines.append(f"{clock:<19} {incident.step:>8} {lost:>10} {downtime:>10}  {incident.cause}")
    return lines


def _members(session: int) -> dict[int, str]:
    """Returns the living processes of a session of this host and the state of each, as Linux has it (T: stopped); none on other systems."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session, *_ = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if int(its_session) == session and state not in "ZX":
            found[int(path.parent.name)] = state
    return found


def _kill(session: int) -> None:
    """Kills all processes of the session, again and again: one may have just started another."""
    while members := _members(session):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _cause(status: int, silent: bool) -> str:
    if silent:
        return f"no sign of life for {_SILENT_SECONDS} s, killed"
    number = -status if status < 0 else status - 128  # a launcher's shell reports a signal as 128 + its number
    if status < 0 or number in set(signal.Signals):
        return f"killed by {signal.Signals(number).name}"
    known = {START_AGAIN: "preempted", HUNG: "hang", PEER_LOST: "another process was lost", MISCOMPUTED: "a device computed wrongly"}
    known[OCCUPIED] = "another command is at work in the workdir"
    return known.get(status, f"crash (exit status {status})")


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
