"""A full disk costs the lines that would have gone there, and a warning; afterwards files are whole and grow again."""

import json
import shutil
import subprocess
import threading
import time

import pytest

from herd_jax.reliability import appender
from herd_jax.reliability.appender import Appender
from herd_jax.reliability.goodput import read_goodput
from herd_jax.reliability.supervisor import Incident, Supervisor
from herd_jax.reliability.timeline import Timeline
from herd_jax.reliability.watchdog import Watchdog, WatchdogConfig
from herd_jax.training.metrics import MetricsWriter


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(appender, "_last_warning", -float("inf"))


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk):
    with pytest.raises(OSError, match="No space left"), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def test_a_piece_is_written_whole_or_not_at_all(disk, capsys):
    file = Appender(disk / "new" / "file")
    file.append(b"one\n")
    file.append(bytes(2 << 20))  # of which a part has room
    assert (disk / "new" / "file").read_bytes() == b"one\n"
    fill(disk)
    for _ in range(2000):
        file.append(b"lost\n")
    assert capsys.readouterr().err == (
        f"warning: cannot write {disk}/new/file (No space left on device): the run goes on without, and notes nothing until it can\n"
    )
    (disk / "ballast").unlink()
    file.append(b"two\n")
    file.close()
    lines = (disk / "new" / "file").read_bytes().splitlines()
    assert lines[0] == b"one" and lines[-1] == b"two" and set(lines[1:-1]) <= {b"lost"} and len(lines) < 2000


def test_a_run_goes_on_while_its_disk_is_full(disk, capsys, monkeypatch):
    """Metrics, timeline, flight record, sign of life and incidents: they begin, lose and begin again."""
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    workdir = disk / "run"
    writer, timeline = MetricsWriter(workdir, 0), Timeline(workdir, time.time())
    timeline.begin(0)
    watchdog, supervisor = Watchdog(WatchdogConfig(), timeline, workdir), Supervisor(["true"], workdir)

    def take(first, last):
        for step in range(first, last):
            timeline.enter("step", step)
            timeline.enter("evaluation", step + 1)
            writer.write(step + 1, {"loss": 1.0, **{f"extra_{i}": 0.5 for i in range(100)}})
        watchdog._write_seen()
        watchdog._leave_record("a test", "evaluation")
        timeline.begin(last)  # which it closes
        supervisor._note(Incident(time.time(), "host", last, "a test"))
        supervisor._settle()

    take(0, 3)
    fill(disk)
    capsys.readouterr()
    take(3, 30)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and err[0].startswith("warning: cannot write ") and "no flight record (No space left on device)" in err[1]
    writer.close()
    writer = MetricsWriter(workdir, 2)  # a start in the middle of it
    timeline = Timeline(workdir, time.time())
    (disk / "ballast").unlink()
    timeline.begin(30)
    take(30, 32)
    writer.close()
    timeline.close()
    assert not failed
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 31, 32]
    assert max(interval.step for interval in read_goodput(workdir).intervals) == 32
    assert [json.loads(line)["step"] for line in (workdir / "incidents.jsonl").read_text().splitlines()][-1] == 32


def test_where_no_room_is_but_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        Appender(tmp_path / "file" / "below")
