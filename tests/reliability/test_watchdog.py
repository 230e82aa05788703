"""The watchdog: its limits, what a flight record says, and that a process which hangs ends with a record and a status of its own."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import herd_jax
from herd_jax.errors import HUNG, UserError
from herd_jax.reliability.timeline import Timeline
from herd_jax.reliability.watchdog import Watchdog, WatchdogConfig
from herd_jax.reliability.workdir import TIMELINE

CONFIG = WatchdogConfig(factor=10, min_seconds=5, other_seconds=100)
HANGS = """
import sys, threading, time
from pathlib import Path
from herd_jax.reliability.timeline import Timeline
from herd_jax.reliability.watchdog import Watchdog, WatchdogConfig

def stuck_here():
    threading.Event().wait()

workdir = Path(sys.argv[1])
timeline = Timeline(workdir, time.time())
timeline.begin(7)
with Watchdog(WatchdogConfig(min_seconds=0.5), timeline, workdir):
    for step in range(7, 12):
        timeline.enter("input wait", step)
        timeline.enter("step")
        timeline.step_done(0.001)
    stuck_here()
"""


@pytest.fixture
def timeline(tmp_path):
    made = Timeline(tmp_path, time.time())
    made.begin(3)
    return made


def test_limits(timeline, tmp_path):
    watchdog = Watchdog(CONFIG, timeline, tmp_path)
    assert watchdog.limit() == 100  # init
    timeline.enter("step", 3)
    assert watchdog.limit() == 100  # no step is known yet
    for seconds in (0.1, 0.1, 30.0):
        timeline.step_done(seconds)
    assert watchdog.limit() == 5
    for seconds in (2.0, 2.0, 2.0):
        timeline.step_done(seconds)
    assert watchdog.limit() == pytest.approx(10 * 2.0)
    for activity in ("compile", "evaluation", "checkpoint stall"):
        timeline.enter(activity)
        assert watchdog.limit() == 100
    timeline.enter("input wait")
    assert watchdog.limit() == pytest.approx(20)


def test_a_flight_record_names_phases_and_peers(timeline, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 3)
    (tmp_path / "flight" / "seen").mkdir(parents=True)
    for process, age in ((0, 1), (1, 500), (2, 2), (9, 9000)):  # 9 is of an earlier start, of more processes
        seen = {"host": f"node{process}", "pid": 40 + process, "time": time.time() - age, "step": 3 - process, "activity": "input wait"}
        (tmp_path / "flight" / "seen" / f"{process}.json").write_text(json.dumps(seen))
    timeline.enter("input wait", 3)
    timeline.enter("step", 3)
    lines = Watchdog(CONFIG, timeline, tmp_path).record("no progress").splitlines()
    assert lines[0].startswith("process 0 of 3 on ")
    assert lines[1] == "in activity 'step' after step 3: no progress"
    peers = [line for line in lines if re.match(r"  process \d+ on node", line)]
    assert [int(line.split()[1]) for line in peers] == [1, 2, 0]  # the longest unseen first
    assert re.fullmatch(r"  process 1 on node1 \(pid 41\): 50\d s ago, step 2, input wait", peers[0])
    assert lines[-2].endswith("0 init") or lines[-2].endswith("3 init")
    assert lines[-1].endswith("3 input wait")


def test_a_hang_ends_the_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(herd_jax.__file__).parents[1])}
    process = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == HUNG, process.stderr
    assert re.fullmatch(r"watchdog: no progress for \d+ s, and the limit is \d+ s; the flight record is .*\n", process.stderr)
    (record,) = (tmp_path / "flight").glob("step-11-process-0-*.txt")
    text = record.read_text()
    assert "in activity 'step' after step 11: no progress for" in text and "stuck_here" in text
    assert text.count(" input wait\n") == 5
    last = json.loads((tmp_path / TIMELINE).read_text().splitlines()[-1])
    assert last["seconds"]["hang"] > 0.5 and last["to"] == 11


def test_no_thread_and_no_files_where_it_is_switched_off(timeline, tmp_path):
    with Watchdog(dataclasses.replace(CONFIG, enabled=False), timeline, tmp_path):
        assert not (tmp_path / "flight").exists()


@pytest.mark.parametrize("field, value", [("factor", 1.0), ("min_seconds", 0.0), ("other_seconds", float("inf"))])
def test_limits_that_cannot_be(field, value):
    with pytest.raises(UserError, match=rf"train.watchdog.{field} is "):
        dataclasses.replace(CONFIG, **{field: value})
