"""launch/quickstart.sh with a few steps of a tiny model on a small text, in this interpreter instead of a new .venv."""

import argparse
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "quickstart.sh"
TINY = ("--config.model.name=llama-tiny", "--config.train.seq_len=64", "--config.optimizer.warmup_steps=2", "--config.log.every_steps=5",
        "--config.eval.every_steps=5", "--config.model.vocab_size=4096")  # fmt: skip


def quickstart(directory: Path, *arguments: str, text: str = "texts/*.txt", workdir: str = "run") -> subprocess.CompletedProcess:
    """Runs the script from `directory`, on one CPU device."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    env |= {"HERD_PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = ["bash", str(SCRIPT), "--text", text, f"--config.workdir={workdir}", *arguments]
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """With 200 kB of text, more than a trained tokenizer needs, and a file too small for one."""
    directory = tmp_path_factory.mktemp("quickstart")
    (directory / "texts").mkdir()
    for module in (argparse, inspect, json, os, subprocess):
        (directory / "texts" / f"{module.__name__}.txt").write_text(inspect.getsource(module))
    (directory / "note.md").write_text(inspect.getsource(json))
    return directory


@pytest.fixture(scope="module")
def first(directory) -> subprocess.CompletedProcess:
    return quickstart(directory, *TINY, "--config.train.num_steps=20")


def test_trains_and_samples(directory, first):
    assert first.returncode == 0, first.stderr
    losses = [line["loss"] for line in metrics(directory)]
    evaluated = [line for line in metrics(directory) if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.5 and evaluated[-1]["val_loss"] < evaluated[0]["val_loss"]
    assert (directory / "run" / "checkpoints" / "20").is_dir()
    before, _, after = first.stdout.partition("A sample:\n")
    *sample, closing = after.splitlines()
    assert f"{evaluated[-1]['val_bits_per_byte']:.2f} bits per byte" in before.splitlines()[-1]
    assert "".join(sample).strip() and closing.startswith("Next: ")


def test_same_command_continues(directory, first):
    data = sorted((path, path.stat().st_mtime_ns) for path in (directory / "run-data").rglob("*"))
    more = quickstart(directory, *TINY, "--config.train.num_steps=25")
    assert more.returncode == 0, more.stderr
    assert "continues at step 20" in more.stdout
    assert [line["step"] for line in metrics(directory)] == [1, 5, 10, 15, 20, 21, 25]
    assert data == sorted((path, path.stat().st_mtime_ns) for path in (directory / "run-data").rglob("*"))
    done = quickstart(directory, *TINY, "--config.train.num_steps=25")
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout and done.stdout.splitlines()[-1].startswith("Next: ")


def test_other_text_needs_another_workdir(directory, first):
    other = quickstart(directory, *TINY, text="note.md")
    assert other.returncode != 0 and "--config.workdir" in other.stderr


def test_text_too_small_for_a_trained_tokenizer_becomes_bytes(directory):
    small = quickstart(directory, *TINY, "--config.train.num_steps=2", text="note.md", workdir="small")
    assert small.returncode == 0, small.stderr
    assert (directory / "small" / "tokenizer" / "tokenizer.bytes").is_file()


@pytest.mark.parametrize("arguments", [("--text",), ("--steps", "3")], ids=" ".join)
def test_wrong_arguments_are_one_sentence(directory, arguments):
    wrong = quickstart(directory, *arguments)
    assert wrong.returncode != 0 and not wrong.stdout
    assert wrong.stderr.startswith("error: ") and len(wrong.stderr.splitlines()) == 1
