"""One command at a time writes into a directory; what a killed one left behind is taken over, with a note."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from herd_jax.errors import OCCUPIED, Occupied, UserError
from herd_jax.reliability import lock
from herd_jax.reliability.lock import only_writer
from herd_jax.reliability.supervisor import Supervisor

HOLDER = """
import sys, time
from pathlib import Path
from herd_jax.reliability.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0)


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_refused_and_told_who_is_first(tmp_path, other_process):
    with pytest.raises(Occupied, match=rf"at work in {tmp_path} \(process {other_process.pid} on {socket.gethostname()}, since 20.*\): wait"):
        with only_writer(tmp_path):
            pass
    other_process.send_signal(signal.SIGTERM)
    other_process.wait()


def test_what_a_killed_process_held_is_taken_over_with_a_note(tmp_path, other_process, capfd):
    other_process.kill()
    other_process.wait()
    assert (tmp_path / "lock").exists()
    with only_writer(tmp_path):
        assert f"note: process {other_process.pid} on" in capfd.readouterr().err
    assert not (tmp_path / "lock").exists()
    with only_writer(tmp_path):
        assert capfd.readouterr().err == ""


def test_a_directory_that_is_new_goes_again_if_nothing_is_written(tmp_path):
    with only_writer(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new" / "run").exists()
    with only_writer(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["file"]


def test_a_worker_that_outlives_its_command_still_holds(tmp_path):
    with only_writer(tmp_path):
        worker = subprocess.Popen([sys.executable, "-c", f"from herd_jax.reliability import lock; import time; from pathlib import Path; "
                                   f"lock.join(Path({str(tmp_path)!r})); print('joined', flush=True); time.sleep(600)"],
                                  stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert worker.stdout.readline() == "joined\n"
        os.link(tmp_path / "lock", tmp_path / "kept")
    os.rename(tmp_path / "kept", tmp_path / "lock")  # as if the command had been killed, and had not deleted it
    with pytest.raises(Occupied):
        with only_writer(tmp_path):
            pass
    worker.kill()
    worker.wait()
    with only_writer(tmp_path):
        pass


def name(host, process, began):
    return json.dumps({"host": host, "process": process, "began": began, "since": time.time()})


@pytest.mark.parametrize(
    ("holder", "is_free"),
    [
        (lambda: name(socket.gethostname(), os.getppid(), lock._began(os.getppid())), False),
        (lambda: name(socket.gethostname(), os.getppid(), "1"), True),  # its number was given to another process
        (lambda: name(socket.gethostname(), 2**22 + 1, "1"), True),
        (lambda: name("another host", 1, "1"), False),
        (lambda: "", True),
        (lambda: "damaged", True),
        (lambda: json.dumps({"host": "another", "process": "1", "began": "1", "since": 0}), True),
        (lambda: json.dumps({"host": "another", "process": 1, "began": "1", "since": "then"}), True),
        (lambda: "[]", True),
    ],
)
def test_a_file_system_without_locks(holder, is_free, tmp_path, monkeypatch):
    def refuse(descriptor, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "lock").write_text(holder())
    if is_free:
        with only_writer(tmp_path):
            pass
    else:
        with pytest.raises(Occupied, match=f"wait for it, or delete {tmp_path / 'lock'} if it is gone"):
            with only_writer(tmp_path):
                pass


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="run cannot be made"):
        with only_writer(tmp_path / "file" / "run"):
            pass


def test_the_supervisor_does_not_insist(tmp_path):
    """Another run is at work in the workdir, and so further steps appear there that are not this command's."""
    command = [sys.executable, "-c", f"import sys; sys.exit({OCCUPIED})"]
    assert Supervisor(command, tmp_path, backoff_seconds=0).run() == OCCUPIED
    assert not (tmp_path / "incidents.jsonl").exists()
