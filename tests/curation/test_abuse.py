"""Whole curation runs that go wrong: hostile documents, a full disk, missing things, interrupts, dying workers, two runs at once."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_runs import FRENCH, SETTINGS, configured, prose, results

from herd_jax.curation.input.reading import find_inputs
from herd_jax.curation.reporting.data import dropped_files
from herd_jax.curation.reporting.report import inspect
from herd_jax.curation.run import curate
from herd_jax.errors import UserError

TEXTS = (
    *("", "x", " ", "\n" * 9999, "\0" * 999, "\u200b" * 999, "\ufeff" * 99, "\u0301" * 9999, "." * 9999, "1" * 9999, "\U0010ffff" * 999),
    *("$" * 9999, "[" * 9999, "<" * 9999, "{" * 9999, "|" * 9999, "a@" * 9999, "\\begin{" * 999, "\x85\u2028" * 999, "\x1b[0m" * 999),
    *("\ue000\ue0010\ue002" * 99, "😀" * 999, "的" * 9999, "ก" * 9999, "\u202e\u200fשלום. " * 99, "a" * 99_999, "ab " * 9999),
)
IDS = ("a\nb\r\n\0c", "same", "same", "", None, 7, 1.5, [1], "\ud800", "x" * 9999)
URLS = (
    *("http://[::1", "://", "http://a b/c\nd", "\ud800", "http://" + "a." * 999 + "com", "\0", "http://\u202e.com/%ff%00"),
    *("http://١٢٣:99999/", 5, {"a": 1}),
)
DATES = ("yesterday", "2020-13-45", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+14:00", 5, [], "\ud800", "٢٠٢٠-٠١-٠١")
NOT_ROWS = (b"{", b"[]", b"5", b"\xff\xfe", b'{"text": 5}', b"[" * 9999)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Prose for two tasks."""
    directory = tmp_path_factory.mktemp("texts")
    (directory / "docs.jsonl").write_text("".join(json.dumps({"text": prose(i)}) + "\n" for i in range(500)))
    return directory


@pytest.fixture(scope="module")
def undisturbed(texts, tmp_path_factory) -> Path:
    """The workdir of a run to which nothing happened."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    curate(configured(texts, workdir))
    assert json.loads((workdir / "phases" / "tasks.json").read_text())["read"] == 2
    return workdir


def hostile(directory: Path) -> int:
    """Writes hostile files and returns how many documents they hold."""
    kinds = ("text/html", "text/plain", "text/x-code")
    rows = [{"id": f"{kind}-{i}", "text": text, "media_type": kind} for i, text in enumerate(TEXTS) for kind in kinds]
    rows += [{"id": name, "text": prose(i)} for i, name in enumerate(IDS)]
    rows += [{"id": f"url-{i}", "text": prose(100 + i), "url": url} for i, url in enumerate(URLS)]
    rows += [{"id": f"date-{i}", "text": prose(200 + i), "date": date, "url": "http://e.org/same"} for i, date in enumerate(DATES)]
    files = {
        "rows.jsonl": b"\n".join([*(json.dumps(row).encode() for row in rows), *NOT_ROWS]),
        **{"empty.txt": b"", "empty.html": b"", "empty.py": b"", "one.txt": b"x", "nul.html": b"\0" * 99},
        **{f"random.{suffix}": random.Random(0).randbytes(5000) for suffix in ("txt", "html", "py")},
        **{"latin.txt": FRENCH.encode("latin-1"), "utf16.txt": FRENCH.encode("utf-16")},
        "half.txt": FRENCH.encode()[:301] + b"\xc3\xff" + FRENCH.encode(),
        "line\nbreak.txt": prose(300).encode(),
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    long = ("word " * 2_000_000 + "的" * 1000).encode()  # 10 MB on one line
    (directory / "long.txt").write_bytes(long)
    dates = pa.array([0, 2**62], pa.timestamp("us"))  # the second is beyond Python's last year
    pq.write_table(pa.table({"text": [prose(400), prose(401)], "date": dates}), directory / "dates.parquet")
    return len(rows) + len(files) - 1 + 3


def test_every_hostile_document_has_one_verdict(tmp_path):
    directory = tmp_path / "in"
    directory.mkdir()
    num_documents = hostile(directory)
    for workers in (1, 2):
        with pytest.raises(UserError, match="the run is done, but 2 inputs were damaged .*dates.parquet .*rows.jsonl"):
            curate(configured(directory, tmp_path / f"run{workers}", workers=workers))
    run = tmp_path / "run1"
    assert results(run) == results(tmp_path / "run2")
    dropped = [json.loads(line) for file in dropped_files(run) for line in file.read_text().splitlines()]
    kept = [row for file in (run / "clean").rglob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(dropped) + len(kept) == num_documents
    assert {"same", "a\nb\r\n\0c", "7", f"{directory}/line\nbreak.txt#0"} <= {row["id"] for row in kept}
    assert [line["reason"] for line in dropped if "long.txt" in line["id"]] == ["too_long"]
    assert sum(row["id"].startswith("date-") for row in kept) == 1 and sum(row["id"] == "same" for row in kept) == 2
    assert "inputs that could not be read: 2" in inspect(run)


MISSING = (
    ({"language": {"model_path": "/none"}}, "language model /none does not exist"),
    ({"language": {"languages": ("xx",)}}, "does not know 'xx'"),
    ({"quality": {"linear": {"path": "/none"}}}, "classifier /none does not exist"),
    ({"quality": {"transformer": {"path": "/"}}}, "/ is damaged or no transformer classifier"),
    ({"categories": {"topics": "/none"}}, "classifier /none does not exist"),
    ({"topic_caps": {"sport": 0.1}}, "topic_caps is set, but categories.topics is not"),
    ({"high_quality": 0.5}, "high_quality is set, but no document gets a quality"),
    ({"tokenizer": "/none"}, "tokenizer /none does not exist"),
    ({"tokenizer": "12"}, "tokenizer is 12: a vocabulary to train needs 260 or more"),
    ({"decontamination": {"benchmarks": ({"name": "mmlu", "path": "/none"},)}}, "benchmark mmlu cannot be read from /none"),
    ({"decontamination": {"benchmarks": ({"name": "mmlu", "path": os.devnull},)}}, "benchmark mmlu has no items"),
    ({"mix": {"targets": ({"shares": {"genral": 1.0}},)}}, "the mix names 'genral', which is no category"),
    ({"validation_fraction": 0}, "validation_fraction is 0.0: it must be more than 0"),
    ({"urls": {"adult_domains": ("/none",)}}, "URL list /none does not exist"),
    ({"input": ("/none/*",)}, r"source /none/\* matches no files"),
)


@pytest.mark.parametrize(("settings", "message"), MISSING)
def test_what_is_missing_is_said_before_anything_is_done(texts, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        curate(configured(texts, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()  # so that the corrected command is not refused


def test_a_workdir_that_is_none(texts, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="file cannot be made: cannot write .* \\(File exists\\): see that"):
        curate(configured(texts, tmp_path / "file"))


def test_a_directory_that_cannot_be_read(texts, tmp_path, monkeypatch):
    def walk(path, onerror):
        onerror(PermissionError(errno.EACCES, "Permission denied", f"{path}/secret"))
        return []

    monkeypatch.setattr(os, "walk", walk)  # the tests may run as root, whom nothing is forbidden
    with pytest.raises(UserError, match=r"directory .*secret cannot be read \(Permission denied\)"):
        find_inputs((str(texts),), tmp_path)


def test_nothing_left_is_said(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="no document is left: see which block dropped them"):
        curate(configured(tmp_path / "short.txt", tmp_path / "run"))


def test_a_full_disk_is_one_sentence_and_the_run_continues(texts, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        for megabytes in (2, 6, 500):  # after the failure at the size before
            with pytest.raises(UserError, match="the disk is full, as task .* found: make room, and the same command continues"):
                curate(configured(texts, disk / "run"))
            subprocess.run(["mount", "-o", f"remount,size={megabytes}m", disk], check=True)
        curate(configured(texts, disk / "run"))
        assert results(disk / "run") == results(undisturbed)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_without_a_task_is_a_sentence_too(texts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("herd_jax.curation.run._settle", full)
    with pytest.raises(UserError, match="run cannot be read or written: No space left on device; when the cause is removed"):
        curate(configured(texts, tmp_path / "run"))


def test_two_runs_at_once_are_refused(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("herd_jax.reliability.lock._PATIENCE_SECONDS", 0)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as other:
        other.write(json.dumps({"host": "another", "process": 123, "began": "1", "since": 0}))
        other.flush()
        fcntl.flock(other, fcntl.LOCK_SH)  # as the workers of a run hold it
        with pytest.raises(UserError, match=r"another command is at work in .*run \(process 123 on another, since .*\): wait for it, or stop it"):
            curate(configured(texts, tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


def start(texts: Path, workdir: Path) -> subprocess.Popen:
    """A run with two workers, in its own processes, until its first task is done."""
    config = workdir.with_suffix(".py")
    config.write_text(f"def get_config():\n    return {SETTINGS | {'workers': 2}}\n")
    command = [sys.executable, "-m", "herd_jax.curate", "--config", str(config), f"--config.workdir={workdir}", f"--config.input={texts}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    done = workdir / "phases" / "read" / "completions"
    while not (done.exists() and any(done.iterdir())) and process.poll() is None:
        time.sleep(0.02)
    return process


def test_an_interrupt_and_a_killed_worker_are_one_sentence_and_the_run_continues(texts, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(texts, workdir)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and said.endswith("interrupted: the same command continues\n") and "Traceback" not in said
    curate(configured(texts, workdir))
    assert results(workdir) == results(undisturbed)
    workdir = tmp_path / "other"
    process = start(texts, workdir)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [pid for pid in workers if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 1 and "was killed, most likely for want of memory: the same command with fewer" in said.splitlines()[-1]
    curate(configured(texts, workdir))
    assert results(workdir) == results(undisturbed)
