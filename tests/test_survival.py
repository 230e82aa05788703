"""A run that is killed, told to stop and started again, as the one who is on call sees it: nothing is lost, and the accounts are right."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import NUM_STEPS, arguments, assert_same_run, base, run, start, uninterrupted  # noqa: F401

import herd_jax
from herd_jax.errors import START_AGAIN
from herd_jax.reliability.goodput import read_goodput

ROOT = Path(herd_jax.__file__).parents[1]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def send_at(process, signals):
    """Sends the process's child each (step, signal number) once that step is shown; all of stdout."""
    out, signals = [], list(signals)
    for line in process.stdout:
        out.append(line)
        if signals and line.startswith(f"step {signals[0][0]}/"):
            os.kill(children(process.pid)[0], signals.pop(0)[1])
    return "".join(out)


def test_supervised_through_a_kill_and_a_preemption(base, uninterrupted, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    process = start("herd_jax.supervise", ["--backoff", "0.1", "--", sys.executable, "-m", "herd_jax.train", *arguments(base, workdir)])
    out = send_at(process, [(9, signal.SIGKILL), (14, signal.SIGTERM)])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_run(workdir, uninterrupted)
    killed, preempted = (json.loads(line) for line in (workdir / "incidents.jsonl").read_text().splitlines())
    assert killed["cause"] == "killed by SIGKILL" and 0 <= killed["lost_steps"] <= 8
    assert preempted["cause"] == "preempted" and preempted["lost_steps"] == 0 and preempted["step"] >= 14
    assert f"stopped after step {preempted['step']} and saved: the same command continues there\n" in err
    assert f"continues at step {preempted['step']} in" in out and "killed by SIGKILL" in out.splitlines()[-2]
    goodput = read_goodput(workdir)
    assert goodput.num_starts == 3 and max(interval.step for interval in goodput.intervals) == NUM_STEPS
    assert goodput.seconds["downtime"] > 0 and goodput.seconds["productive"] > 0 and goodput.seconds["hang"] == 0
    shown = float(re.findall(r"goodput ([\d.]+)% of ", out)[-1])
    assert shown == pytest.approx(100 * goodput.fraction, abs=0.2)  # the run's own account ends a moment before the timeline
    assert not list((workdir / "flight" / "seen").glob("*.json"))


def test_steps_computed_twice_change_nothing_and_are_accounted_for(base, uninterrupted, tmp_path):  # noqa: F811
    run(base, tmp_path / "run", "train.verify_every_steps=5")
    assert_same_run(tmp_path / "run", uninterrupted)
    assert read_goodput(tmp_path / "run").seconds["verification"] > 0 == read_goodput(uninterrupted).seconds["verification"]


@pytest.mark.parametrize("field, words", [("data.sources=nowhere", "data source nowhere"), ("train.num_step=5", "unknown config key")])
def test_an_error_of_the_user_is_not_tried_again(field, words, base, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "herd_jax.train", *arguments(base, tmp_path / "run", field)]
    process = start("herd_jax.supervise", ["--", *command])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and words in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_signal_to_one_process_stops_all_at_the_same_step(base, tmp_path):  # noqa: F811
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "HERD_PYTHON": sys.executable}
    # Not logged at the step of the signal: what they agree on is not what a logged step tells them.
    fields = ("mesh.dp=2", "log.every_steps=5", "train.num_steps=4000", "checkpoint.every_steps=4000", "eval.every_steps=4000")
    command = ["bash", str(ROOT / "launch" / "local_multiprocess.sh"), "2", *arguments(base, tmp_path / "run", *fields)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "start_new_session": True}
    process = subprocess.Popen(command, **pipes)
    for line in process.stdout:
        if re.match(r"\[0\] step 10/", line):
            second = [pid for pid in children(process.pid) if "HERD_PROCESS_ID=1\0" in Path(f"/proc/{pid}/environ").read_text()]
            os.kill(second[0], signal.SIGUSR1)
    err = process.stderr.read()
    assert process.wait(timeout=300) == START_AGAIN, err
    stopped = re.findall(r"^\[(\d)\] stopped after step (\d+) and saved", err, re.MULTILINE)
    assert {number for number, _ in stopped} == {"0", "1"} and len({step for _, step in stopped}) == 1, err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()] == [stopped[0][1]]
