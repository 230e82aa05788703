"""The loop under signals: a run that is told to stop in an evaluation ends there, and its next start makes up for it."""

import dataclasses
import json
import os
import signal

import pytest
from run_configs import numbered_streams

from herd_jax.config import parse
from herd_jax.errors import StartAgain, UserError
from herd_jax.reliability.signals import ending_at_once
from herd_jax.training.config import RunConfig
from herd_jax.training.loop import train
from herd_jax.training.next_token import NEXT_TOKEN, StreamData

NUM_STEPS = 6
CLOCKED = ("tokens_per_second", "mfu", "step_time_s", "input_wait_fraction", "goodput")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return numbered_streams(tmp_path_factory.mktemp("loop"))


def config(data, workdir):
    return parse(RunConfig, {
        "workdir": str(workdir), "data": {"sources": str(data)},
        "model": {"name": "llama-tiny", "dim": 32, "ffn_dim": 64, "num_layers": 1, "vocab_size": 259},
        "train": {"num_steps": NUM_STEPS, "global_batch_size": 8, "seq_len": 32},
        "checkpoint": {"every_steps": 4}, "log": {"every_steps": 1}, "eval": {"every_steps": 3, "num_batches": 4},
    })  # fmt: skip


def told_in_evaluation(number, which):
    """The task, whose evaluation number `which` is told to stop after its second batch."""
    calls = [0]

    class Told(StreamData):
        def validate(self, params, phase, heed):
            calls[0] += 1
            batches = [0]

            def told():
                batches[0] += 1
                if (calls[0], batches[0]) == (which, 2):
                    os.kill(os.getpid(), number)
                heed()

            return super().validate(params, phase, told)

    return dataclasses.replace(NEXT_TOKEN, open=Told)


def lines(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKED} for line in found]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(config(data, workdir), NEXT_TOKEN)
    return lines(workdir)


@pytest.mark.parametrize("which, step, number, error, words", [
    (1, 3, signal.SIGINT, UserError, "interrupted after step {}"), (2, 6, signal.SIGTERM, StartAgain, "stopped after step {} and saved"),
])  # fmt: skip
def test_a_signal_in_an_evaluation(which, step, number, error, words, data, undisturbed, tmp_path):
    with pytest.raises(error, match=words.format(step)):
        train(config(data, tmp_path / "run"), told_in_evaluation(number, which))
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, step))
    with pytest.raises(error, match=words.format(step)):  # told again where it makes up for the evaluation: still nothing is lost
        train(config(data, tmp_path / "run"), told_in_evaluation(number, 1))
    train(config(data, tmp_path / "run"), NEXT_TOKEN)
    assert lines(tmp_path / "run") == undisturbed


def test_a_signal_before_the_first_step(data, tmp_path, monkeypatch):
    """While the state is read or made, and while the first step has not begun: nothing was saved, and nothing is said to be."""
    monkeypatch.setattr("herd_jax.training.loop.restore", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StartAgain, match="stopped before the first step of this start: the same command"):
        train(config(data, tmp_path / "run"), NEXT_TOKEN)
    monkeypatch.undo()

    class Slow(StreamData):
        def iterate(self, first_step):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().iterate(first_step)

    with pytest.raises(StartAgain, match="stopped before the first step: the same command starts it"):
        train(config(data, tmp_path / "run"), dataclasses.replace(NEXT_TOKEN, open=Slow))
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("number, error", [(signal.SIGINT, UserError), (signal.SIGTERM, StartAgain), (signal.SIGUSR1, StartAgain)])
def test_what_ends_at_once_gives_the_handlers_back(number, error):
    before = signal.getsignal(number)
    with pytest.raises(error, match="at the gate: the same command continues there"):
        with ending_at_once("at the gate"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
