"""One run in several processes of fake devices: the same losses, whatever their number, which may change; and they stop together."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from herd_jax.data.tokenization import tokenize_files
from herd_jax.errors import PEER_LOST

ROOT = Path(__file__).parents[2]
NUM_STEPS = 8
CONFIG = """
def get_config():
    return {
        "model": {"name": "llama-tiny", "dim": 32, "ffn_dim": 64, "num_layers": 2, "vocab_size": 259},
        "mesh": {"pp": 2, "dp": 2},
        "train": {"num_steps": 8, "global_batch_size": 8, "seq_len": 32, "num_micro_batches": 2},
        "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 4, "decay_steps": 24},
        "checkpoint": {"every_steps": 4, "keep": 3},
        "eval": {"every_steps": 2, "num_batches": 2},
        "log": {"every_steps": 1},
    }
"""
RESULTS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "val_loss")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("processes")
    words = random.Random(0)
    (base / "text").mkdir()
    for i in range(10):
        (base / "text" / f"{i}.txt").write_text(" ".join(words.choices("the cat sat on a mat and then it ran".split(), k=90)))
    tokenize_files([str(base / "text")], "bytes", base / "data", validation_fraction=0.2, processes=1)
    (base / "config.py").write_text(CONFIG)
    return base


def start(num_processes, base, workdir, *fields, flags=()):
    """The launcher with `num_processes` processes, in a session of its own, with the tests' quick compilation."""
    compilation = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = {**os.environ, "XLA_FLAGS": compilation, "PYTHONPATH": str(ROOT), "HERD_PYTHON": sys.executable,
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    fields = (f"data.sources={base / 'data'}", f"workdir={workdir}", *fields)
    arguments = [*flags, "--config", str(base / "config.py"), *(f"--config.{field}" for field in fields)]
    command = ["bash", str(ROOT / "launch" / "local_multiprocess.sh"), str(num_processes), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def run(num_processes, base, workdir, *fields, flags=()):
    """(exit status, stdout, stderr) of a run to its end."""
    process = start(num_processes, base, workdir, *fields, flags=flags)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def until(process, pattern):
    """Reads lines until one matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError("".join(lines) + process.stderr.read())


def results(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))  # written once
    return [{name: line[name] for name in RESULTS if name in line} for line in lines]


def assert_close(workdir, expected):
    """As the run of one process, but for the order in which gloo and the devices of one process add."""
    for line, expected_line in zip(results(workdir), results(expected), strict=True):
        assert line == pytest.approx(expected_line, rel=2e-5)


@pytest.fixture(scope="module")
def one_process(base):
    status, _, err = run(1, base, base / "one")
    assert status == 0, err
    return base / "one"


@pytest.mark.slow
def test_two_processes_then_four_after_an_interrupt(base, one_process, tmp_path):
    """Ctrl-C, here before or in the first evaluation, stops both after the same step; four processes continue there, and end with the losses of
    one."""
    process = start(2, base, tmp_path / "run")
    until(process, r"^\[0\] step 1/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    stopped = re.findall(r"^\[(\d)\] error: interrupted after step (\d+)", err, re.MULTILINE)
    assert len(stopped) == 2 and len({step for _, step in stopped}) == 1, err
    assert int(stopped[0][1]) < NUM_STEPS, "it was not interrupted in time"
    assert not re.search(r"^\[1\] step", out, re.MULTILINE)
    status, out, err = run(4, base, tmp_path / "run")
    assert status == 0, err
    assert f"continues at step {stopped[0][1]}" in out
    assert_close(tmp_path / "run", one_process)
    for workdir in (tmp_path / "run", one_process):  # XLA does not keep the order of a loaded program's collectives
        assert not list(workdir.glob("compilation_cache/*/*"))


def test_one_device_keeps_its_compiled_programs(base, tmp_path):
    status, _, err = run(1, base, tmp_path / "run", "mesh.pp=1", "mesh.dp=1", "train.num_steps=1")
    assert status == 0, err
    assert list((tmp_path / "run").glob("compilation_cache/*/*"))


def test_a_killed_process_ends_all_and_one_process_continues(base, one_process, tmp_path):
    process = start(2, base, tmp_path / "run")
    until(process, r"^\[0\] step 5/")
    parent = f"/proc/{process.pid}/task/{process.pid}/children"
    for pid in Path(parent).read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the launcher's own short sleeps come and go
            if "HERD_PROCESS_ID=1\0" in Path(f"/proc/{pid}/environ").read_text():
                os.kill(int(pid), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode in (PEER_LOST, 128 + signal.SIGKILL)
    assert re.search(r"^\[0\] error: process 1 on \S+ died without a word", err, re.MULTILINE), err
    status, _, err = run(1, base, tmp_path / "run")
    assert status == 0, err
    assert_close(tmp_path / "run", one_process)


def test_an_error_of_one_process_is_told_by_both(base, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)  # in the way of process 0, which alone writes metrics
    status, _, err = run(2, base, tmp_path / "run")
    assert status == 1
    for process in (0, 1):
        assert re.search(rf"^\[{process}\] error: .*cannot write metrics in {tmp_path}", err, re.MULTILINE), err


def test_preflight_of_two_processes(base, tmp_path):
    status, out, err = run(2, base, tmp_path / "run", "mesh.tp=2", "mesh.pp=1", flags=["--preflight"])
    assert status == 0, err
    header, *rows = out.splitlines()
    assert re.match(r"\[0\] process +host .*all-reduce tp GB/s +all-reduce dp GB/s", header)
    assert len(rows) == 2 and all(re.match(rf"\[0\] {i} .* 2 x cpu .* ok$", row) for i, row in enumerate(rows))
    assert not (tmp_path / "run" / "checkpoints").exists()
