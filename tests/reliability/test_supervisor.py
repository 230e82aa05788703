"""The supervisor, over small programs that do what a training run might: move on, crash, hang, be told to stop."""

import json
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from herd_jax.errors import HUNG, MISCOMPUTED, START_AGAIN, UserError
from herd_jax.reliability import supervisor
from herd_jax.reliability.goodput import furthest_step
from herd_jax.reliability.supervisor import Supervisor

# A start of the run: it goes on from the last checkpoint (every 4 steps), and ends as the line of `plan` with its number says.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

workdir = Path(sys.argv[1])
starts = workdir / "starts"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("." * (number + 1))
to, end = json.loads((workdir / "plan").read_text())[number]
lines = (workdir / "goodput.jsonl").read_text().splitlines() if number and (workdir / "goodput.jsonl").exists() else []
begin = json.loads(lines[-1])["to"] // 4 * 4 if lines else 0
now = time.time()
if to is not None:
    with (workdir / "goodput.jsonl").open("a") as file:
        file.write(json.dumps({"start": now - 1, "time": now, "seconds": {"step": 0.5}, "from": begin, "to": to}) + chr(10))
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    (workdir / "waits").touch()
    while True:
        time.sleep(0.05)
if end == "silent":
    (workdir / "flight/seen").mkdir(parents=True)
    (workdir / "flight/seen/0.json").write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
    os.kill(os.getpid(), signal.SIGSTOP)
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervisor, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "_SILENT_SECONDS", 0.3)
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.5)


def supervised(workdir, plan, **options):
    """(exit status, number of starts, incidents) of a run whose starts each reach a step, or none, and end with a status or a signal."""
    (workdir / "plan").write_text(json.dumps(plan))
    (workdir / "program.py").write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, str(workdir / "program.py"), str(workdir)]
    status = Supervisor(command, workdir, backoff_seconds=0.01, **options).run()
    incidents = workdir / "incidents.jsonl"
    lines = [json.loads(line) for line in incidents.read_text().splitlines()] if incidents.exists() else []
    return status, len((workdir / "starts").read_text()), lines


def test_restarts_until_the_run_is_done(tmp_path, capsys):
    plan = [(6, -signal.SIGKILL), (9, HUNG), (13, START_AGAIN), (17, 77), (18, 134), (20, 0)]
    status, starts, incidents = supervised(tmp_path, plan)
    assert (status, starts) == (0, 6)
    assert [(i["step"], i["cause"], i["lost_steps"]) for i in incidents] == [
        (6, "killed by SIGKILL", 2), (9, "hang", 1), (13, "preempted", 1), (17, "another process was lost", 1),
        (18, "killed by SIGABRT", 2),
    ]  # fmt: skip
    assert all(incident["downtime_seconds"] is not None and incident["host"] for incident in incidents)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["time", "step", "lost", "steps", "downtime", "cause"] and len(out) == 6
    assert out[2].endswith("  hang")


def test_an_error_of_the_user_is_passed_through(tmp_path, capsys):
    assert supervised(tmp_path, [(None, 1)]) == (1, 1, [])
    assert capsys.readouterr().out == "no incidents\n"


def test_a_device_that_computes_wrongly_is_not_tried_again(tmp_path, capsys):
    status, starts, incidents = supervised(tmp_path, [(5, MISCOMPUTED), (8, 0)])
    assert (status, starts) == (MISCOMPUTED, 1)
    assert [(i["step"], i["cause"], i["lost_steps"]) for i in incidents] == [(5, "a device computed wrongly", None)]


def test_a_crash_after_steps_is_no_error_of_the_user(tmp_path):
    status, starts, incidents = supervised(tmp_path, [(5, 1), (None, 1), (8, 0)])
    assert (status, starts) == (0, 3)
    assert [(i["step"], i["cause"], i["lost_steps"]) for i in incidents] == [
        (5, "crash (exit status 1)", None), (5, "crash (exit status 1)", 1),
    ]  # fmt: skip


def test_gives_up_after_failures_at_the_same_step(tmp_path, capsys):
    status, starts, incidents = supervised(tmp_path, [(5, 3), (6, 3), (6, 3), (5, 3), (6, 3), (9, 0)], give_up_after=3)
    assert (status, starts, len(incidents)) == (3, 5, 5)
    assert "3 failures in a row without a step beyond 6 (the last: crash (exit status 3)): giving up" in capsys.readouterr().err


def test_preemption_is_no_failure(tmp_path):
    status, starts, incidents = supervised(tmp_path, [(4, START_AGAIN)] * 4 + [(8, 0)], give_up_after=1)
    assert (status, starts, len(incidents)) == (0, 5, 4)


def test_a_stopped_process_is_killed(tmp_path):
    status, starts, incidents = supervised(tmp_path, [(5, "silent"), (8, 0)])
    assert (status, starts) == (0, 2)
    assert incidents[0]["cause"].startswith("no sign of life")


LAUNCHER = """
import os, signal, subprocess, sys
from pathlib import Path

workdir, number = Path(sys.argv[1]), len(list(Path(sys.argv[1]).glob("left-*")))
victim = sys.argv[2]
if number:
    sys.exit(0)
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
(workdir / "left-0").write_text(str(left.pid))
os.kill(left.pid if victim == "child" else os.getpid(), signal.SIGKILL if victim == "killed" else signal.SIGSTOP)
left.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes /proc")
@pytest.mark.parametrize("victim, cause", [("child", "no sign of life"), ("launcher", "no sign of life"), ("killed", "killed by SIGKILL")])
def test_nothing_of_a_launcher_is_left_at_the_next_start(victim, cause, tmp_path):
    """Its process is stopped, or it is itself, or it dies before its process."""
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), victim]
    supervised = Supervisor(command, tmp_path, backoff_seconds=0.01)
    assert supervised.run() == 0 and [incident.cause.startswith(cause) for incident in supervised.incidents] == [True]
    stat = Path("/proc") / (tmp_path / "left-0").read_text() / "stat"
    assert not stat.exists() or ") Z " in stat.read_text()  # dead, where nobody may have asked for its status


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 1), (signal.SIGHUP, START_AGAIN)])
def test_a_terminal_reaches_the_child_through_the_supervisor(number, status, tmp_path):
    script = "import signal, time, sys; signal.signal(signal.{}, lambda *_: sys.exit(1)); open({!r}, 'w'); time.sleep(600)"
    heard = "SIGINT" if number == signal.SIGINT else "SIGTERM"
    command = [sys.executable, "-c", script.format(heard, str(tmp_path / "waits"))]

    def send():
        while not (tmp_path / "waits").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.default_int_handler)  # it may be ignored here, as under nohup
    try:
        threading.Thread(target=send).start()
        assert Supervisor(command, tmp_path).run() == status
    finally:
        signal.signal(number, before)


def test_a_signal_is_forwarded_and_ends_both(tmp_path):
    def send():
        while not (tmp_path / "waits").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send).start()
    assert supervised(tmp_path, [(5, "wait"), (8, 0)]) == (START_AGAIN, 1, [])
    assert signal.getsignal(signal.SIGTERM) is handler and furthest_step(tmp_path) == 5


@pytest.mark.parametrize("options, words", [({"give_up_after": 0}, "give-up-after is 0"), ({"backoff_seconds": -1.0}, "backoff is -1")])
def test_options_that_cannot_be(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        Supervisor(["true"], tmp_path, **options)
