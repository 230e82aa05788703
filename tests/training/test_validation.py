"""Validation: the loss of each source against a plain sum over its held-out text, bytes counted, old metrics unchanged."""

import math

import jax
import numpy as np
import pytest
import tiny

from herd_jax.data.batches import read_batch
from herd_jax.data.ramp import Phase
from herd_jax.data.rows import DataConfig, StreamRows, load_data_tokenizer, open_streams
from herd_jax.data.streams import StreamWriter
from herd_jax.data.tokenization import tokenize_files
from herd_jax.errors import UserError
from herd_jax.models.config import LlamaConfig
from herd_jax.text.tokenizer import load_tokenizer
from herd_jax.training.config import EvalConfig, RunConfig
from herd_jax.training.task import Stopped
from herd_jax.training.validation import HeldOutLoss, Validation, source_names

MODEL = LlamaConfig(32, 2, 4, 2, 8, 48, vocab_size=259, rope_theta=1e4)
PHASE = Phase(0, 8, 16, 2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    base, rng = tmp_path_factory.mktemp("validation"), np.random.default_rng(0)
    for name, letters, num_documents in (("letters", "abcdefgh ", 120), ("accents", "äöü日本 ", 12)):
        (base / "text" / name).mkdir(parents=True)
        for i in range(num_documents):
            (base / "text" / name / f"{i}.txt").write_text("".join(rng.choice(list(letters), rng.integers(5, 60))))
        tokenize_files([str(base / "text" / name)], "bytes", base / name, validation_fraction=0.3, processes=1)
    return [str(base / "letters"), str(base / "accents")]


def make(sources, steps, num_batches=1000):
    config = RunConfig("unused", DataConfig(dict.fromkeys(sources, 1.0)), eval=EvalConfig(num_batches=num_batches))
    streams = open_streams(config.data, "validation")
    return Validation(config, steps, streams, load_data_tokenizer(config.data, streams)), streams


def test_each_source_against_a_plain_sum(sources):
    """All held-out rows: losses of the plain forward, and the bytes of all documents."""
    steps = tiny.make_steps(config=MODEL)
    params, canonical = steps.plan.init(0).params, tiny.canonical_params(steps)
    validation, streams = make(sources, steps)
    found = validation.by_source(params, PHASE)
    assert list(found) == ["letters", "accents"]
    for loss, stream in zip(found.values(), streams, strict=True):
        rows = StreamRows(stream, 16, True)
        fields = {field: np.stack([rows[i][field] for i in range(len(rows))]) for field in rows[0]}
        logits = tiny.plain_logits(canonical, fields, MODEL)
        chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), fields["targets"][..., None], -1)[..., 0]
        assert loss.nats == pytest.approx(-float(np.sum(chosen, where=fields["loss_mask"])), rel=1e-5)
        assert loss.num_targets == stream.num_tokens - stream.num_documents  # a begin token is no target
        assert loss.num_bytes == stream.num_bytes


def test_metrics_are_weighted_by_targets(sources):
    steps = tiny.make_steps(config=MODEL)
    params = steps.plan.init(0).params
    validation, _ = make(sources, steps)
    letters, accents = validation.by_source(params, PHASE).values()
    values = validation.metrics(params, PHASE)
    assert list(values) == ["val_loss", "val_bits_per_byte", "val_bits_per_byte/letters", "val_bits_per_byte/accents"]
    nats = letters.nats + accents.nats
    assert values["val_loss"] == pytest.approx(nats / (letters.num_targets + accents.num_targets))
    assert values["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / (letters.num_bytes + accents.num_bytes))
    assert values["val_bits_per_byte/accents"] == pytest.approx(accents.nats / math.log(2) / accents.num_bytes)


def test_one_source_has_no_name_and_the_value_of_the_plain_batches(sources):
    """Bit for bit what the mean over the batches was before losses were kept apart."""
    steps = tiny.make_steps(config=MODEL)
    params = steps.plan.init(0).params
    validation, (stream,) = make(sources[:1], steps, num_batches=2)
    values = validation.metrics(params, PHASE)
    rows = StreamRows(stream, 16, True)
    chosen = [rows[k * len(rows) // 16] for k in range(16)]
    batches = [read_batch(chosen, first, PHASE, steps.batch_sharding).to_devices(steps.batch_sharding) for first in (0, 8)]
    sums = [steps.evaluate(params, batch) for batch in batches]
    assert values.keys() == {"val_loss", "val_bits_per_byte"}
    assert values["val_loss"] == np.sum([float(s["loss"]) for s, _ in sums]) / np.sum([float(c["targets"]) for _, c in sums])
    targets = [int(target) for row in chosen for target in row["targets"][row["loss_mask"]]]
    expected = sum(float(s["loss"]) for s, _ in sums) / math.log(2) / sum(target < 256 for target in targets)
    assert values["val_bits_per_byte"] == pytest.approx(expected)


def test_the_same_on_another_mesh(sources):
    values = []
    for sizes in ({}, {"dp": 2, "cp": 2, "tp": 2}):
        steps = tiny.make_steps(config=MODEL, **sizes)
        values.append(make(sources, steps, num_batches=1)[0].metrics(steps.plan.init(0).params, PHASE))
    assert values[0] == pytest.approx(values[1], rel=1e-5) and len(values[0]) == 4


def test_a_source_without_rows_is_left_out(sources):
    steps = tiny.make_steps(config=MODEL)
    validation, _ = make(sources, steps, num_batches=1)
    assert list(validation.by_source(steps.plan.init(0).params, Phase(0, 1, 16, 1))) == ["letters"]  # the longer


def test_names_and_totals():
    assert source_names(["data/web", "data/code"]) == ["web", "code"]
    assert source_names(["a/web", "b/web", "code"]) == ["a/web", "b/web", "code"]
    total = HeldOutLoss.total([HeldOutLoss(2.0, 4.0, 3), HeldOutLoss(1.0, 2.0, 5)])
    assert total == HeldOutLoss(3.0, 6.0, 8) and total.nats_per_token == 0.5 and total.bits_per_byte == 3 / math.log(2) / 8


def test_nothing_to_measure_is_found_before_the_run(tmp_path):
    """One held-out document of special tokens only: tokens to predict, and no bytes of text in them."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path / "s" / "tokenizer")
    with StreamWriter(tmp_path / "s" / "validation", 259, tokenizer_fingerprint=tokenizer.fingerprint) as writer:
        writer.append(np.array([tokenizer.bos_id, tokenizer.eos_id]), np.array([2]), 0)
    validation, _ = make([str(tmp_path / "s")], tiny.make_steps(config=MODEL))
    with pytest.raises(UserError, match="the 1 held-out rows of s that an evaluation takes have no text to predict"):
        validation.check([PHASE])


def test_heed_is_called_between_batches(sources):
    validation, _ = make(sources, tiny.make_steps(config=MODEL), num_batches=4)
    calls = []

    def heed():
        calls.append(None)
        if len(calls) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        validation.metrics(tiny.make_steps(config=MODEL).plan.init(0).params, PHASE, heed)
    assert len(calls) == 2
