"""Metrics: what a resumed run finds in its files, and what a console shows without a terminal."""

import json
import math
import os
import pty
import struct

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from herd_jax.errors import UserError
from herd_jax.training import metrics
from herd_jax.training.metrics import Console, MetricsWriter


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """The events of every TensorBoard file, in the order of the files' names (record framing: length, crc, data, crc)."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:])):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def write_steps(workdir, resume_step, steps, loss=1.0):
    writer = MetricsWriter(workdir, resume_step)
    for step in steps:
        writer.write(step, {"loss": loss, "tokens": 7})
    writer.close()


def test_values_go_to_both_files(tmp_path):
    writer = MetricsWriter(tmp_path / "new" / "workdir", 0)
    writer.write(1, {"loss": np.float32(0.5), "mfu": None, "grad_norm": math.nan, "tokens": 3})
    assert lines(tmp_path / "new" / "workdir") == [
        {"step": 1, "loss": 0.5, "mfu": None, "grad_norm": None, "tokens": 3}
    ]  # flushed
    writer.close()
    (event,) = [event for event in events(tmp_path / "new" / "workdir") if event.HasField("summary")]
    assert event.step == 1 and {value.tag: value.simple_value for value in event.summary.value} == {"loss": 0.5, "tokens": 3.0}


def test_a_resumed_run_drops_the_steps_it_computes_again(tmp_path):
    write_steps(tmp_path, 0, range(1, 6))
    write_steps(tmp_path, 3, [4, 5, 6], loss=2.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [1, 4]
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "12", '{"step"', "\x00\x00"])
def test_a_torn_line_is_dropped(tmp_path, torn):
    write_steps(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write_steps(tmp_path, 2, [3])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_steps(tmp_path, 0, [1])
    assert not list(tmp_path.iterdir())


def test_a_refusing_disk_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write metrics in .*file.*File exists"):
        MetricsWriter(tmp_path / "file", 0)


def test_console_without_a_terminal_prints_plain_lines(capsys, monkeypatch):
    times = iter([0.0, 10.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(times))
    with Console(num_steps=4000) as console:
        console.update(10, {"loss": 2.0, "val_loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.4321})
        console.message("[a note] 1/2 " + "x" * 200)
        console.update(20, {"loss": 1.5, "tokens_per_second": 1.0, "mfu": None})
    assert capsys.readouterr().out.splitlines() == [
        "step 10/4000 | loss 2.0000 | val loss 2.5000 | 12,346 tokens/s | MFU 43.2%",
        "[a note] 1/2 " + "x" * 200,
        "step 20/4000 | loss 1.5000 | val loss 2.5000 | 1 tokens/s | 1:06:20 left",
    ]


def test_console_on_a_terminal_keeps_one_live_line(monkeypatch):
    controller, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with os.fdopen(terminal, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        with Console(num_steps=2) as console:
            console.update(1, {"loss": 2.0})
            console.message("a note")
            console.update(2, {"loss": 1.0})
        stdout.write("END")
        stdout.flush()
        shown = ""
        while "END" not in shown:
            shown += os.read(controller, 65536).decode()
    os.close(controller)
    assert "step 2/2 | loss 1.0000" in shown and "a note" in shown
    assert "\x1b[2K" in shown  # the line is erased and drawn again, not repeated below


def test_console_is_silent_on_other_processes(capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Console(num_steps=2) as console:
        console.update(1, {"loss": 2.0})
        console.message("a note")
    assert capsys.readouterr().out == ""
