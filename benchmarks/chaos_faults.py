"""The supervised run that `chaos.py` disturbs, and the kinds of faults: how each is done, and when the run has moved again."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from chaos_world import ROOT, World

SPACING, SAVE_EVERY = 30, 10  # steps
STEP = r"^\[0\] step (\d+)/"
START = r"^\[0\] .*; (?:continues at step (\d+)|starts) in "
DETECTED = r"\berror: |watchdog: |warning: |stopped after step|supervise: "
ENDING = r"watchdog: |supervise: |\berror: "


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault. `needs`: a piece of the world. `lasts`: the steps, or at most the seconds, for which a fault stands that the run may bear in
    silence; None where it has to say something. `ends`: whether the processes end of it. `alone`: whether a process without a peer can notice."""

    says: str
    needs: str = ""
    lasts: tuple[int, int] | None = None
    ends: bool = True
    alone: bool = True


KINDS = {
    "kill": Kind("SIGKILL of one process"),
    "coordinator": Kind("SIGKILL of the coordinator"),
    "hang": Kind("SIGSTOP of one process", alone=False),
    "terminate": Kind("SIGTERM of one process"),
    "preempt": Kind("SIGTERM of the supervisor"),
    "truncate": Kind("SIGKILL of all, newest checkpoint truncated"),
    "rename": Kind("SIGKILL of all while a save is renamed"),
    "flip": Kind("a bit flipped in a parameter or a moment", alone=False),
    "fewer": Kind("SIGKILL of one process, half of them come back"),
    "fill": Kind("disk full", "disk", ends=False),
    "inodes": Kind("no inode left", "disk", ends=False),
    "readonly": Kind("checkpoint directory read-only", "disk", ends=False),
    "slow": Kind("disk slow (256 KiB/s)", "slow", (12, 40), ends=False),
    "swap": Kind("30 % of the memory swapped", "swap", (12, 40), ends=False),
    "pause": Kind("network of one process down for 6 s", "network", (SPACING, 6), ends=False, alone=False),
    "unplug": Kind("network of one process down for 20 s", "network", (SPACING, 20), ends=False, alone=False),
    "clock": Kind("the clock jumps by an hour", "", (2, 20), ends=False),
}
PATIENCE_SECONDS = 240
MISCOMPUTED = 78  # the exit status of a run that found a wrong bit: somebody has to replace the host


class Stuck(Exception):
    """The run did not do what it had to."""


class Job:
    """The supervised run in `directory`, and the lines that it printed, each with its time."""

    def __init__(self, directory: Path, config: Path, processes: int, world: World, fields: tuple[str, ...]) -> None:
        self.workdir, self.world = directory / "run", world
        self.hosts = directory / "hosts"  # how many there are: the launcher asks at every start
        self.hosts.write_text(str(processes))
        launch = ["bash", "-c", 'exec bash "$0" "$(cat "$1")" "${@:2}"', str(ROOT / "launch" / "local_multiprocess.sh"), str(self.hosts)]
        arguments = ["--config", str(config), f"--config.workdir={self.workdir}", *fields]
        self._command = [sys.executable, "-m", "herd_jax.supervise", "--backoff", "1", "--", *launch, *arguments]
        self._log = directory / "log.txt"
        self.lines: list[tuple[float, str]] = []
        self.start()

    def start(self) -> None:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        env = environment() | self.world.environment()
        self.supervisor = subprocess.Popen(self._command, env=env, start_new_session=True, **pipes)
        threading.Thread(target=self._read, args=(self.supervisor.stdout,), daemon=True).start()

    def processes(self) -> list[int]:
        """Of the training, whose parent is the launcher, whose parent is the supervisor."""
        launchers = children(self.supervisor.pid)
        of_training = [pid for launcher in launchers for pid in children(launcher) if b"\0-m\0herd_jax.train\0" in command_of(pid)]
        if not of_training:
            raise Stuck("no process of the training is there")
        return of_training

    def find(self, pattern: str, since: int) -> tuple[int, float, re.Match] | None:
        """The first line from number `since` on that matches: its number and time."""
        for number, (when, line) in enumerate(self.lines[since:], since):
            if match := re.search(pattern, line):
                return number, when, match
        return None

    def wait_for(self, pattern: str, since: int) -> tuple[int, float, re.Match]:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if found := self.find(pattern, since):
                return found
            time.sleep(0.02)
        raise Stuck(f"no line matches {pattern} in {PATIENCE_SECONDS} s")

    def wait_for_step(self, step: int, since: int) -> None:
        """Until this step, or a later one, is shown."""
        number, _, match = self.wait_for(STEP, since)
        while int(match[1]) < step:
            number, _, match = self.wait_for(STEP, number + 1)

    def num_steps(self, since: int) -> int:
        """Returns how many steps were shown from line number `since` on."""
        return sum(re.search(STEP, line) is not None for _, line in self.lines[since:])

    def wait(self) -> int:
        try:
            return self.supervisor.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise Stuck(f"the supervisor did not end in {PATIENCE_SECONDS} s") from error

    def end(self) -> None:
        """Kills what is left."""
        if self.supervisor.poll() is None:
            launchers = children(self.supervisor.pid)
            for pid in [self.supervisor.pid, *launchers, *(child for launcher in launchers for child in children(launcher))]:
                send(pid, signal.SIGKILL)
            self.supervisor.wait()

    def _read(self, stream) -> None:
        with self._log.open("a") as log:
            for line in stream:
                self.lines.append((time.time(), line))
                log.write(f"{time.time():.2f} {line}")
                log.flush()


def draw(chance: random.Random, num_faults: int, names: list[str]) -> list[str]:
    """Draws each kind as often as another, give or take one; no fault that only a peer could notice for a process that is alone."""
    while True:
        rounds = [chance.sample(names, len(names)) for _ in range(-(-num_faults // len(names)))]
        plan, alone, possible = [name for names in rounds for name in names][:num_faults], False, True
        for name in plan:
            possible &= KINDS[name].alone or not alone
            alone = name == "fewer" or alone and not KINDS[name].ends
        if possible:
            return plan


def inject(job: Job, name: str, processes: int, chance: random.Random) -> tuple[dict, int]:
    """Does it, waits until the run has moved again; the row of the table, and the number of the line at which it had."""
    kind, since, start = KINDS[name], len(job.lines), time.time()
    if kind.ends:
        job.hosts.write_text(str(processes // 2 if name == "fewer" else processes))
        detected = kill(job, name, since, chance)
        number, _, begun = job.wait_for(START, since)
    else:
        detected = disturb(job, name, since, chance)
        number, begun = len(job.lines), None
        if job.find(ENDING, since) and (found := wait_for_start(job, since)):
            number, _, begun = found
    moved_at, moved, step = job.wait_for(STEP, number + 1)
    if name == "truncate" and not job.find("is unreadable", since):
        raise Stuck("nobody noticed the truncated checkpoint")
    shown = [int(match[1]) for _, line in job.lines[:number] if (match := re.search(STEP, line))]
    reached, continued = (shown[-1], int(begun[1] or 0)) if begun else (int(step[1]), int(step[1]))
    row = {"kind": name, "step": reached, "detected_s": detected and round(detected - start, 2), "restarted": bool(begun), "continued_at": continued}
    lost, down = max(reached - continued, 0), round(moved - (detected or start), 2) if begun else 0.0
    return row | {"lost_steps": lost, "downtime_s": down}, moved_at


def kill(job: Job, name: str, since: int, chance: random.Random) -> float:
    """Does a fault of which the processes end; returns when the run or its supervisor said so."""
    pids = job.processes()
    victim = chance.choice(pids)
    if name in ("truncate", "rename"):
        if name == "rename":
            wait_for_rename(job.workdir / "checkpoints")
        for pid in pids:
            send(pid, signal.SIGKILL)
        if name == "truncate":
            truncate_newest(job.workdir, chance)
    elif name == "preempt":
        send(job.supervisor.pid, signal.SIGTERM)
    elif name == "flip":
        return flip(job, pids.index(victim), since)
    else:
        number = {"hang": signal.SIGSTOP, "terminate": signal.SIGTERM}.get(name, signal.SIGKILL)
        send(pids[0] if name == "coordinator" else victim, number)
    _, detected, _ = job.wait_for(DETECTED, since)
    if name == "preempt":
        start_again(job, 75)
    return detected


def flip(job: Job, process: int, since: int) -> float:
    """Flips bits, of which a running step may overwrite some, until one is found; then plays the operator, who has replaced the host."""
    for _ in range(20):
        job.world.flip_bit(process)
        at = len(job.lines)
        while not (found := job.find(r"\berror: .*(copies of|computed twice)", since)) and len(job.lines) < at + 30:
            time.sleep(0.02)
        if found:
            start_again(job, MISCOMPUTED)
            return found[1]
    raise Stuck("nobody noticed a flipped bit")


def start_again(job: Job, expected: int) -> None:
    if (status := job.wait()) != expected:
        raise Stuck(f"the supervisor ended with {status}, not with {expected}")
    job.start()


def disturb(job: Job, name: str, since: int, chance: random.Random) -> float | None:
    """Does a fault that the run should bear, until it has said so or for as long as the kind says; returns when it said so, if it did."""
    world, victim = job.world, chance.randrange(len(job.processes()))
    fault = {
        "fill": world.full_disk, "inodes": world.no_inodes, "readonly": world.read_only_disk, "slow": world.slow_disk, "swap": world.little_memory,
        "pause": lambda: world.network_pause(victim), "unplug": lambda: world.network_pause(victim),
        "clock": lambda: world.shifted_clock(chance.choice([-3600, 3600])),
    }[name]  # fmt: skip
    lasts = KINDS[name].lasts
    with fault():
        if lasts is None:
            job.wait_for(DETECTED, since)
        else:
            steps, seconds = lasts
            end = time.monotonic() + seconds
            while time.monotonic() < end and job.num_steps(since) < steps:
                time.sleep(0.05)
    found = job.find(DETECTED, since)
    return found and found[1]


def wait_for_start(job: Job, since: int) -> tuple[int, float, re.Match] | None:
    """Waits for the start that a message of an ending run announces; None where steps go on instead."""
    number, end = job.find(ENDING, since)[0], time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if found := job.find(START, since):
            return found
        if job.num_steps(number) > SAVE_EVERY:
            return None
        time.sleep(0.05)
    raise Stuck(f"the run neither went on nor started again in {PATIENCE_SECONDS} s")


def wait_for_rename(checkpoints: Path) -> None:
    """Returns as soon as a save has its final name."""
    known, end = set(os.listdir(checkpoints)), time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if any(name.isdigit() for name in set(os.listdir(checkpoints)) - known):
            return
    raise Stuck("no checkpoint was saved")


def truncate_newest(workdir: Path, chance: random.Random) -> None:
    """Halves the largest file of the newest checkpoint, durable or (of one process, where all have it) local."""
    local = [{path.name for path in tier.iterdir()} for tier in workdir.glob("local/*")]
    whole = set.intersection(*local) if local else set()
    saved = [*workdir.glob("checkpoints/*"), *(path for path in workdir.glob("local/*/*") if path.name in whole)]
    saved = [path for path in saved if path.name.isdigit()]
    newest = chance.choice(sorted(path for path in saved if int(path.name) == max(int(path.name) for path in saved)))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HERD_PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has just ended
