"""The gate after a stage: what it asks for by hand, and a small model that has not learned held back by it."""

import json
import math
import random

import pytest

from herd_jax.config import parse
from herd_jax.data.tokenization import tokenize_files
from herd_jax.errors import UserError
from herd_jax.evaluation.needles.gate import StageGate, judge
from herd_jax.training.config import RunConfig
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.stages.config import GateConfig
from herd_jax.training.stages.stages import stage_configs, train_stages


def recall(lowest, depth=0.5):
    return {64: {0.0: 1.0, depth: 1.0}, 128: {0.0: 1.0, depth: lowest}}


@pytest.mark.parametrize(
    "gate, short_loss, before, found, passes, words",
    [
        ({}, 2.0, None, recall(1.0), True, ["short-context loss 2.0000", "needles: 100% found at every length and depth up to 128"]),
        ({}, 2.0, 1.99, recall(1.0), True, ["within 0.02 of 1.9900 before"]),
        ({}, 2.0, 1.97, recall(1.0), False, ["not within 0.02 of 1.9700 before"]),
        ({"short_margin": 0.04}, 2.0, 1.97, recall(1.0), True, []),
        ({"short_margin": math.inf}, 9.0, 1.97, recall(1.0), True, []),
        ({}, 1.9, 1.97, recall(0.75), False, ["75% found at 128 tokens, depth 0.5", "100% are asked for"]),
        ({"needle_recall": 0.75}, 1.9, 1.97, recall(0.75), True, []),
        ({}, 1.9, 1.97, {}, True, []),
        ({}, math.nan, 1.97, recall(1.0), False, []),
    ],
)
def test_judged_by_hand(gate, short_loss, before, found, passes, words):
    verdict = judge(GateConfig(**gate), short_loss, before, found)
    assert verdict.passed == passes and all(word in verdict.reason for word in words), verdict.reason


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    base, words = tmp_path_factory.mktemp("gate"), random.Random(0)
    (base / "text").mkdir()
    for i in range(10):
        (base / "text" / f"{i}.txt").write_text(" ".join(words.choices("the cat sat on a mat and then it ran".split(), k=90)))
    tokenize_files([str(base / "text")], "bytes", base / "data", validation_fraction=0.2, processes=1)
    return base / "data"


def config(data, workdir, *stages, **gate):
    return parse(RunConfig, {
        "workdir": str(workdir),
        "data": {"sources": str(data)},
        "model": {"name": "llama-tiny", "dim": 32, "ffn_dim": 64, "num_layers": 2, "vocab_size": 259},
        "mesh": {"dp": 8},
        "train": {
            "global_batch_size": 8, "stages": stages,
            "gate": {"num_depths": 3, "num_samples": 1, "template": "record", "round_tokens": 8 * 64, "max_rounds": 1, **gate},
        },
        "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 4, "decay_steps": 24},
        "eval": {"every_steps": 3, "num_batches": 1},
    })  # fmt: skip


SHORT = {"seq_len": 64, "tokens": 8 * 64 * 4}
LONG = {"seq_len": 128, "tokens": 8 * 128, "mesh": {"cp": 2, "dp": 4}, "rope_theta": 1e6}


def test_a_model_that_has_not_learned_is_held_back(data, tmp_path):
    """It finds no needle, trains on for a step, finds none, and the run stops before the long stage; asked for none, it gets there."""
    with pytest.raises(UserError, match=r"stage 1 .* needles: 0% found at 64 tokens, depth \d.*, and 100% are asked for\), also after 1 further"):
        train_stages(config(data, tmp_path, SHORT, LONG), NEXT_TOKEN, StageGate())
    lines = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert [(line["verdict"], line["steps"]) for line in lines] == [("trains on", 4), ("stopped", 5)]
    assert lines[0]["needle_recall"] == {"64": {"0.0": 0.0, "0.5": 0.0, "1.0": 0.0}}
    assert not (tmp_path / "stages" / "2-128").exists()
    long = {**LONG, "gate": {"short_margin": 1e-9, "num_depths": 2, "num_samples": 1, "template": "record", "max_rounds": 0}}
    with pytest.raises(UserError, match="stage 2 .* needles: 0% found"):
        train_stages(config(data, tmp_path, SHORT, long, needle_recall=0), NEXT_TOKEN, StageGate())
    lines = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()][2:]
    assert [(line["stage"], line["verdict"]) for line in lines] == [(1, "passed"), (2, "stopped")]
    assert list(lines[1]["needle_recall"]) == ["64", "128"]
    metrics = [json.loads(line) for line in (tmp_path / "stages" / "1-64" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["short_loss"] == lines[1]["short_loss_before"] == pytest.approx(metrics[-1]["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "stages, gate, words",
    [
        ([{**SHORT, "seq_len": 32}], {}, ["stage 1", "no room for the needles", "ask for longer"]),
        ([SHORT], {"template": "rhyme"}, ["stage 1", "train.gate.template 'rhyme'", "record"]),
        ([{**SHORT, "seq_len": 65}, {**LONG, "seq_len": 130}], {"needle_recall": 0}, ["stage 2", "train.seq_len 65", "mesh.cp 2"]),
        ([{**SHORT, "global_batch_size": 4, "mesh": {"dp": 4, "tp": 2}}, {**LONG, "mesh": {"dp": 8}}], {}, ["stage 2", "mesh.dp 8"]),
    ],
)  # fmt: skip
def test_what_it_cannot_ask_is_refused_before_training(stages, gate, words, data, tmp_path):
    with pytest.raises(UserError, match="the gate after stage") as error:
        StageGate().check(stage_configs(config(data, tmp_path, *stages, **gate)))
    assert all(word in str(error.value) for word in words), error.value
