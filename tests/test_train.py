"""Training as a user runs it: killed, interrupted, moved to another mesh, with damaged checkpoints, bad input and bad losses."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import herd_jax
import herd_jax.generate
import herd_jax.train
from herd_jax.config import parse
from herd_jax.data.tokenization import tokenize_files
from herd_jax.errors import OCCUPIED, UserError
from herd_jax.interop.initial import InitialWeights
from herd_jax.interop.load import open_source
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.reliability.lock import only_writer
from herd_jax.text.tokenizer import load_tokenizer
from herd_jax.training.checkpoints.checkpoint import Checkpointer
from herd_jax.training.config import RunConfig, build_steps
from herd_jax.training.next_token import NEXT_TOKEN

NUM_STEPS = 24
CONFIG = """
def get_config():
    return {
        "model": {"name": "llama-tiny", "dim": 32, "ffn_dim": 64, "num_layers": 3, "vocab_size": 259},
        "train": {"num_steps": 24, "global_batch_size": 8, "seq_len": 32, "num_micro_batches": 2},
        "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 4, "decay_steps": 24},
        "checkpoint": {"every_steps": 4, "keep": 3},
        "eval": {"every_steps": 8, "num_batches": 2},
        "log": {"every_steps": 1},
    }
"""
# Six steps of 256 tokens, then steps of 512 in longer rows.
RAMP = "train.phases=" + str([{"from_tokens": start, "global_batch_size": 8, "seq_len": n} for start, n in ((0, 32), (1500, 64))])
# Of a step's line, what does not depend on the clock.
RESULTS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "val_loss", "val_bits_per_byte")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with a config, and some hundred lines of text as token streams of bytes."""
    base = tmp_path_factory.mktemp("train")
    words = random.Random(0)
    (base / "text").mkdir()
    for i in range(30):
        lines = (" ".join(words.choices("the cat sat on a mat and then it ran".split(), k=9)) for _ in range(12))
        (base / "text" / f"{i}.txt").write_text("\n".join(lines))
    tokenize_files([str(base / "text")], "bytes", base / "data", validation_fraction=0.1, processes=1)
    (base / "config.py").write_text(CONFIG)
    return base


def arguments(base, workdir, *fields):
    fields = (f"data.sources={base / 'data'}", f"workdir={workdir}", *fields)
    return ["--config", str(base / "config.py"), *(f"--config.{field}" for field in fields)]


def start(module, arguments):
    """A process with the tests' quick compilation, but with as many devices as it chooses itself."""
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(herd_jax.__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, "-m", module, *arguments], **pipes)


def run(base, workdir, *fields, succeeds=True):
    """Trains to the end; (stdout, stderr)."""
    process = start("herd_jax.train", arguments(base, workdir, *fields))
    out, err = process.communicate(timeout=300)
    assert process.returncode == (0 if succeeds else 1), err
    return out, err


def stop_at(step, number, base, workdir, *fields):
    """Trains, and sends the signal when a step is shown; (exit status, stderr)."""
    process = start("herd_jax.train", arguments(base, workdir, *fields))
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def results(workdir):
    return [{name: line[name] for name in RESULTS if name in line} for line in metrics(workdir)]


def final_state(workdir):
    """(step, every leaf by name) of the newest checkpoint."""
    checkpointer = Checkpointer(workdir / "checkpoints", keep=3)
    config = parse(RunConfig, {**checkpointer.config(), "pipeline": {}})  # on one device
    steps = build_steps(config, make_mesh(MeshConfig(dp=1), jax.devices()[:1]), NEXT_TOKEN)
    restored = checkpointer.restore(steps.plan.abstract_canonical())
    checkpointer.close()
    assert restored.position.items() >= {"step": restored.step, "tokens": config.train.ramp.tokens_before(restored.step)}.items()
    leaves = jax.tree.leaves_with_path(restored.state)
    return restored.step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(workdir, expected):
    """Bit for bit: every logged result and the final state."""
    assert results(workdir) == results(expected)
    (step, state), (expected_step, expected_state) = final_state(workdir), final_state(expected)
    assert step == expected_step and state.keys() == expected_state.keys()
    for name, leaf in state.items():
        np.testing.assert_array_equal(leaf, expected_state[name], err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(base):
    workdir = base / "uninterrupted"
    run(base, workdir)
    return workdir


def copy_until(step, uninterrupted, workdir):
    """The workdir of a run whose last checkpoint is of `step`."""
    shutil.copytree(uninterrupted, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return workdir


def test_what_a_run_writes(uninterrupted):
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    for line in lines:
        assert {"loss", "grad_norm", "learning_rate", "tokens"} <= line.keys() and line["tokens"] == 256 * line["step"]
        assert all(line[name] > 0 for name in ("tokens_per_second", "mfu", "step_time_s"))
        assert ("val_loss" in line) == ("val_bits_per_byte" in line) == (line["step"] in (8, 16, 24))
    assert lines[0]["loss"] == pytest.approx(np.log(259), rel=0.02)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"] and lines[-1]["val_loss"] < lines[7]["val_loss"]
    assert lines[3]["learning_rate"] == pytest.approx(1e-2) and lines[-1]["learning_rate"] == pytest.approx(3e-6)
    assert list((uninterrupted / "tensorboard").iterdir())
    assert sorted(int(path.name) for path in (uninterrupted / "checkpoints").iterdir()) == [16, 20, 24]


def test_killed_at_a_random_step(base, uninterrupted, tmp_path):
    step = random.randrange(9, NUM_STEPS - 6)  # the save of step 8 has waited for that of step 4
    status, _ = stop_at(step, signal.SIGKILL, base, tmp_path / "run")
    assert status == -signal.SIGKILL
    out, _ = run(base, tmp_path / "run")
    assert "continues at step" in out
    assert_same_run(tmp_path / "run", uninterrupted)


def test_continued_on_another_mesh(base, uninterrupted, tmp_path):
    workdir = copy_until(16, uninterrupted, tmp_path / "run")
    schedule = ("pipeline.schedule=zero_bubble", "pipeline.num_chunks=2", "train.num_micro_batches=4")
    out, _ = run(base, workdir, "mesh.tp=2", "mesh.cp=2", "mesh.pp=2", "checkpoint.every_steps=1", *schedule)
    assert "mesh tp 2 cp 2 pp 2 dp 1" in out and "continues at step 16" in out
    for got, expected in zip(results(workdir), results(uninterrupted), strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    assert final_state(workdir)[0] == NUM_STEPS


@pytest.mark.slow
def test_ramp_interrupted_in_its_second_phase(base, tmp_path):
    """Ctrl-C saves the step it came at; the rest is as if nothing had happened."""
    run(base, tmp_path / "whole", RAMP)
    tokens = [line["tokens"] for line in results(tmp_path / "whole")]
    assert tokens == [256 * step for step in range(1, 7)] + [1536 + 512 * step for step in range(1, NUM_STEPS - 5)]
    status, err = stop_at(9, signal.SIGINT, base, tmp_path / "run", RAMP)
    stopped = re.fullmatch(r"error: interrupted after step (\d+): the same command continues there\n", err)
    assert status == 1 and stopped, err
    out, _ = run(base, tmp_path / "run", RAMP)
    assert f"continues at step {stopped[1]} " in out and 9 <= int(stopped[1]) < NUM_STEPS
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_damaged_checkpoint(base, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    largest = max((workdir / "checkpoints" / "24" / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    os.truncate(largest, largest.stat().st_size // 2)
    out, err = run(base, workdir)
    assert re.fullmatch(r"warning: the checkpoint of step 24 is unreadable .*, using step 20\n", err), err
    assert "continues at step 20" in out
    assert_same_run(workdir, uninterrupted)


def test_finished_run_has_nothing_to_do(base, uninterrupted):
    before = results(uninterrupted)
    out, _ = run(base, uninterrupted)
    assert "nothing to do: 24 steps are done and train.num_steps is 24" in out
    assert results(uninterrupted) == before


def test_non_finite_loss(base, tmp_path):
    """The first update ruins the weights, so the second step has no gradient."""
    ruin = ("optimizer.peak_learning_rate=1e30", "optimizer.warmup_steps=0", "checkpoint.every_steps=1")
    _, err = run(base, tmp_path / "run", *ruin, succeeds=False)
    assert re.fullmatch(r"error: .* not finite at step 2 and the last good checkpoint is of step 1: .*\n", err), err
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert final_state(tmp_path / "run")[0] == 1
    run(base, tmp_path / "run", *ruin, "train.num_steps=5", "train.on_spike=skip")
    assert [line.get("skipped_steps") for line in metrics(tmp_path / "run")] == [None, 1, 1, 1, 1]
    assert final_state(tmp_path / "run")[0] == 5


def refusal(monkeypatch, capsys, entry, arguments):
    """What an entry point says on stderr before it exits with 1, in this process."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as stopped:
        entry()
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


HERE = ("mesh.dp=8", "train.num_micro_batches=1")  # this process has eight devices


@pytest.mark.parametrize(
    "fields, words",
    [
        (["train.num_step=5"], ["unknown config key 'train.num_step'", "did you mean 'train.num_steps'?"]),
        (["train.num_steps=many"], ["'train.num_steps' must be int", "'many'"]),
        (["data.sources=nowhere"], ["data source nowhere does not exist", "herd_jax.tokenize"]),
        (["data.sources="], ["data.sources is empty"]),
        (["data.sources={base}/text"], ["{base}/text/train does not exist", "herd_jax.tokenize"]),
        (["train.seq_len=1000000"], ["train.seq_len 1000000 is longer than the data", "the largest possible is"]),
        (["model.vocab_size=100"], ["token ids up to 258", "model.vocab_size is 100", "at least 259"]),
        (["data.tokenizer={base}/other.model"], ["{base}/other.model"]),
        (["mesh.tp=3", "mesh.dp=0"], ["a multiple of 3", "there are 8", "mesh.tp"]),
        (["mesh.tp=8", "mesh.dp=1"], ["model.num_kv_heads 2 does not divide by mesh.tp 8"]),
        (["pipeline.schedule=2f2b"], ["pipeline.schedule is '2f2b'", "zero_bubble"]),
        (["pipeline.num_chunks=2"], ["runs one chunk", "choose 'interleaved'"]),
        (["pipeline.schedule=interleaved", "pipeline.num_chunks=2"], ["one pipeline rank", "set mesh.pp to 2 or more"]),
        (["train.num_micro_batches=8"], ["train.global_batch_size 8", "train.num_micro_batches 8", "mesh.dp 8"]),
    ],
    ids=lambda value: value[0] if value[0].count("=") else "",
)
def test_bad_input(fields, words, base, tmp_path, monkeypatch, capsys):
    fields, words = ([text.replace("{base}", str(base)) for text in texts] for texts in (fields, words))
    err = refusal(monkeypatch, capsys, herd_jax.train.main, arguments(base, tmp_path / "run", *HERE, *fields))
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


def test_a_config_that_contradicts_the_checkpoint(base, uninterrupted, monkeypatch, capsys):
    def contents():
        return {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}

    before = contents()
    fields = ("seed=3", "optimizer.b2=0.9", "model.num_layers=2", "train.num_steps=30")
    err = refusal(monkeypatch, capsys, herd_jax.train.main, arguments(base, uninterrupted, *HERE, *fields))
    named = re.search(r"were made with other values of (.*): give the values they were made with, or another workdir", err)
    assert sorted(named[1].split(", ")) == ["model.num_layers", "optimizer.b2", "seed"]
    assert "--config.resume.allow=seed,model.num_layers,optimizer.b2 (seed was 0, " in err
    assert contents() == before


def test_a_change_on_purpose(base, uninterrupted, tmp_path):
    """The advice after a divergence can be followed: in the same workdir, or from one of its steps on in another."""
    lower = ("optimizer.peak_learning_rate=1e-4", "train.num_steps=17")
    workdir = copy_until(16, uninterrupted, tmp_path / "run")
    run(base, workdir, *lower, "resume.allow=optimizer.peak_learning_rate")
    assert [line["learning_rate"] for line in metrics(workdir)][-1] < 1e-4 < metrics(uninterrupted)[16]["learning_rate"]
    (line,) = map(json.loads, (workdir / "history.jsonl").read_text().splitlines())
    assert line["step"] == 16 and line["changes"] == {"optimizer.peak_learning_rate": [0.01, 0.0001]}
    run(base, workdir, *lower)  # from here on it is the run's own
    moments = ("init_moments=true", "train.num_steps=1", "optimizer.warmup_steps=0")
    source = tmp_path / "source"
    shutil.copytree(uninterrupted, source)
    run(base, tmp_path / "branch", f"init_from={source}@16", *moments)
    assert final_state(tmp_path / "branch")[1][".optimizer[0].count"] == 17
    shutil.rmtree(source / "checkpoints" / "16")  # as the other run would do, when it trains on
    on = ("init_moments=true", "train.num_steps=2", "optimizer.warmup_steps=0")
    _, err = run(base, tmp_path / "branch", f"init_from={source}@16", *on)
    assert "the run has begun, and goes on without it" in err and final_state(tmp_path / "branch")[0] == 2
    _, err = run(base, tmp_path / "branch", f"init_from={source}@20", *on, succeeds=False)
    assert "with other values of init_from: " in err
    _, err = run(base, tmp_path / "other", f"init_from={uninterrupted}@15", *moments, succeeds=False)
    assert f"{uninterrupted} has checkpoints of steps 24, 20, 16: name one of them" in err
    _, err = run(base, tmp_path / "other", f"init_from={base}", *moments, succeeds=False)
    assert "holds no model" in err


def test_other_data_at_the_same_path(base, uninterrupted, tmp_path):
    """What a path holds counts, not its name."""
    workdir = copy_until(16, uninterrupted, tmp_path / "run")
    shutil.copytree(base / "data", tmp_path / "moved")
    end = "train.num_steps=17"
    out, _ = run(base, workdir, f"data.sources={tmp_path / 'moved'}", end)
    assert "continues at step 16" in out
    tokenize_files([str(base / "text" / "[0-9].txt")], "bytes", tmp_path / "moved", validation_fraction=0.1, processes=1, overwrite=True)
    _, err = run(base, workdir, f"data.sources={tmp_path / 'moved'}", end, succeeds=False)
    assert "with other values of data.sources: " in err


def test_a_second_run_in_a_workdir(base, uninterrupted, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    monkeypatch.setattr("herd_jax.reliability.lock._PATIENCE_SECONDS", 0)
    with only_writer(uninterrupted):
        monkeypatch.setattr(sys, "argv", ["program", *arguments(base, uninterrupted, *HERE)])
        with pytest.raises(SystemExit) as stopped:
            herd_jax.train.main()
    assert stopped.value.code == OCCUPIED and "error: another command is at work in" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()} == before


def test_generate(uninterrupted, tmp_path, monkeypatch, capsys):
    greedy = ["--max-new-tokens", "12", "--temperature", "0"]
    process = start("herd_jax.generate", ["--model", str(uninterrupted), "--prompt", "the cat", *greedy])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.startswith("the cat") and len(out) > len("the cat\n")
    assert set(out) <= set("the cat sat on a mat and then it ran\n")  # likeliest bytes of a trained model
    for model, words in ((tmp_path, f"{tmp_path} "), (tmp_path / "none", "does not exist: name the directory of a model")):
        assert words in refusal(monkeypatch, capsys, herd_jax.generate.main, ["--model", str(model), "--prompt", "x"])
    assert "max_new_tokens is 0: it must be a whole number, 1 or more" in refusal(
        monkeypatch, capsys, herd_jax.generate.main, ["--model", str(uninterrupted), "--prompt", "x", "--max-new-tokens", "0"]
    )


def test_begins_with_the_weights_of_another_run(base, uninterrupted, tmp_path):
    """On another mesh, with the dimensions of the source whatever the config's model, and a schedule of its own; from an odd path."""
    fields = ("train.num_steps=2", "optimizer.peak_learning_rate=1e-6", "model.dim=64", "mesh.dp=2")
    shutil.copytree(uninterrupted, tmp_path / "odd #1 %20")
    run(base, tmp_path / "run", f"init_from={tmp_path / 'odd #1 %20'}", *fields)
    assert metrics(tmp_path / "run")[0]["loss"] < metrics(uninterrupted)[0]["loss"] - 1
    assert metrics(tmp_path / "run")[-1]["val_loss"] == pytest.approx(metrics(uninterrupted)[-1]["val_loss"], rel=1e-3)
    context_length = open_source(uninterrupted).context_length
    run(base, tmp_path / "short", f"init_from={uninterrupted}", "train.num_steps=1", f"train.seq_len={context_length // 2}")
    run(base, tmp_path / "short", f"init_from={uninterrupted}", "train.num_steps=2", f"train.seq_len={context_length // 2}")
    assert open_source(tmp_path / "short").context_length == context_length  # of which it can do no less than before
    tokenize_files([str(base / "text")], 280, tmp_path / "other", validation_fraction=0.1, processes=1)
    initial = InitialWeights.open(str(uninterrupted))
    initial.check_tokenizer(load_tokenizer("bytes"))
    with pytest.raises(UserError, match="made with another tokenizer than init_from"):
        initial.check_tokenizer(load_tokenizer(tmp_path / "other" / "tokenizer"))
