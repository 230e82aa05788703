"""Averages in the weights against sums by hand, bit for bit for one model, over formats and runs; what differs is refused by name."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.errors import UserError
from herd_jax.interop.formats.mapping import parameters
from herd_jax.interop.initial import InitialWeights
from herd_jax.interop.load import load_params, open_source
from herd_jax.interop.operations.average import average
from herd_jax.interop.save import save
from herd_jax.text.sentencepiece_training import train_sentencepiece
from herd_jax.text.tokenizer import load_tokenizer
from herd_jax.training.checkpoints.checkpoint import Checkpointer
from herd_jax.training.state import State

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=2, vocab_size=259)
BYTES = load_tokenizer("bytes")


def save_constant(path, value, to="herd", dtype="float32", config=CONFIG, **more):
    save(path, to, config, lambda name, layer=None: np.full(parameters(config)[name].shape, value, np.float32), dtype, **more)
    return path


def save_run(workdir, states, config=CONFIG, keep=10):
    """Checkpoints of the steps 10, 20, ... of a run, and its tokenizer."""
    model = {"name": "llama-tiny", **{field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "fp8"}}
    model["rope_scaling"] = dataclasses.asdict(config.rope_scaling)
    checkpointer = Checkpointer(workdir / "checkpoints", keep)
    for number, state in enumerate(states, start=1):
        record = {"workdir": str(workdir), "data": {"sources": {"data": 1.0}}, "model": model}
        checkpointer.save(10 * number, state, record, {"step": 10 * number})
    checkpointer.close()
    BYTES.save(workdir / "tokenizer")
    return workdir


def states(*seeds):
    steps = tiny.make_steps(config=CONFIG, dp=2)
    return [steps.plan.to_canonical(steps.plan.init(seed)) for seed in seeds]


def canonical(path):
    source = open_source(path)
    read = lambda name, d: np.stack([source.read(name, i) for i in d.layers]) if d.layers else source.read(name)
    return {name: read(name, d) for name, d in parameters(source.config).items()}


def by_name(state: State):
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("weights, expected", [((), 3.0), ((1, 3), 4.0), ((0.2, 0.2), 3.0), ((30, 10), 2.0)])
def test_two_models_by_hand(tmp_path, weights, expected):
    """(1 and 5), weighted; weights are divided by their sum."""
    paths = [save_constant(tmp_path / str(value), value) for value in (1.0, 5.0)]
    shares = average(paths, tmp_path / "mean", weights)
    assert [path for path, _ in shares] == paths and sum(share for _, share in shares) == pytest.approx(1)
    assert all((values == expected).all() for values in canonical(tmp_path / "mean").values())


def test_sums_are_kept_in_fp64(tmp_path):
    """In FP32 1e8 + 1 - 1e8 is 0."""
    paths = [save_constant(tmp_path / str(value), value) for value in (1e8, 1.0, -1e8)]
    average(paths, tmp_path / "mean", (1, 3, 1))
    assert all((values == np.float32(0.6)).all() for values in canonical(tmp_path / "mean").values())


def test_bfloat16_is_widened(tmp_path):
    """1 and 1 + 1/128, neighbours in bfloat16: their mean is between them, in FP32, or with --dtype rounded again."""
    paths = [save_constant(tmp_path / str(value), value, "huggingface", "bfloat16") for value in (1.0, 1.0078125)]
    average(paths, tmp_path / "mean")
    assert open_source(tmp_path / "mean").dtype == np.float32
    assert all((values == 1.00390625).all() for values in canonical(tmp_path / "mean").values())
    average(paths, tmp_path / "half", dtype="bfloat16", to="huggingface")
    assert open_source(tmp_path / "half").dtype == ml_dtypes.bfloat16


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8), st.floats(0.01, 100), st.integers(1, 3))
def test_one_model_comes_back_bit_for_bit(tmp_path_factory, values, weight, copies):
    """Also beside copies of itself, with any weight; a -0 stays one."""
    tmp_path = tmp_path_factory.mktemp("one")
    read = lambda name, layer=None: np.resize(np.array(values, np.float32), parameters(CONFIG)[name].shape)
    save(tmp_path / "model", "herd", CONFIG, read, "float32")
    average([tmp_path / "model"] * copies, tmp_path / "mean", [weight] * copies)
    for name, got in canonical(tmp_path / "mean").items():
        expected = canonical(tmp_path / "model")[name]
        assert got.tobytes() == expected.tobytes(), name


def test_the_last_checkpoints_of_a_run(tmp_path):
    """The mean of the two newest of three, in FP64 by hand; it opens as weights to begin with, on a mesh."""
    saved = states(0, 1, 2)
    workdir = save_run(tmp_path / "run", saved)
    shares = average([workdir], tmp_path / "mean", last=2)
    assert shares == [(workdir / "checkpoints" / "20", 0.5), (workdir / "checkpoints" / "30", 0.5)]
    expected = {
        name: ((values.astype(np.float64) + by_name(saved[2])[name]) / 2).astype(np.float32) for name, values in by_name(saved[1]).items()
    }
    for name, got in canonical(tmp_path / "mean").items():
        np.testing.assert_array_equal(got, expected[name], name)
    initial, steps = InitialWeights.open(tmp_path / "mean"), tiny.make_steps(config=CONFIG, tp=2, pp=2)
    initial.check_tokenizer(BYTES)
    begun = by_name(steps.plan.to_canonical(steps.plan.init(0)._replace(params=initial.load_state(steps, 0).params)))
    for name, got in begun.items():
        np.testing.assert_array_equal(got, expected[name], name)


def test_steps_named_and_runs_weighted(tmp_path):
    """A step of a run is a model; a run's checkpoints share its weight."""
    saved = states(0, 1, 2)
    workdir = save_run(tmp_path / "run", saved)
    average([workdir / "checkpoints" / "10"], tmp_path / "first")
    for name, got in canonical(tmp_path / "first").items():
        assert got.tobytes() == by_name(saved[0])[name].tobytes()
    other = save_run(tmp_path / "other", states(3, 4))
    shares = [share for _, share in average([workdir, other], tmp_path / "both", (3, 1), last=2)]
    assert shares == [0.375, 0.375, 0.125, 0.125]
    model = open_source(workdir / "checkpoints" / "20")
    params = load_params(model, tiny.make_steps(config=CONFIG).layout, tiny.make_steps(config=CONFIG).model.declared, jnp.float32)
    np.testing.assert_array_equal(params["ends"]["head"]["norm"], by_name(saved[1])["ends.head.norm"])


def test_a_tokenizer_and_the_shortest_context_stay(tmp_path):
    first = save_constant(tmp_path / "first", 1.0, context_length=512)
    second = save_constant(tmp_path / "second", 2.0, tokenizer=BYTES, context_length=256)
    average([first, second], tmp_path / "mean")
    mean = open_source(tmp_path / "mean")
    assert mean.tokenizer.fingerprint == BYTES.fingerprint and mean.context_length == 256 and mean.config == CONFIG


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dim": 64}, "has dim 32 and .*second has 64: only models of one architecture"),
        ({"num_layers": 3}, "has num_layers 2 and .*second has 3"),
        ({"rope_theta": 5e5}, "has rope_theta 10000.0 and .*second has 500000.0"),
        ({"tie_embeddings": True}, "has tie_embeddings False and .*second has True"),
    ],
)
def test_other_architectures_are_refused(tmp_path, change, words):
    save_constant(tmp_path / "first", 1.0)
    save_constant(tmp_path / "second", 1.0, config=dataclasses.replace(CONFIG, **change))
    with pytest.raises(UserError, match=words):
        average([tmp_path / "first", tmp_path / "second"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_how_weights_were_drawn_does_not_matter(tmp_path):
    save_constant(tmp_path / "first", 1.0)
    save_constant(tmp_path / "second", 3.0, config=dataclasses.replace(CONFIG, init_std=0.5))
    average([tmp_path / "first", tmp_path / "second"], tmp_path / "mean")
    assert (canonical(tmp_path / "mean")["ends.head.norm"] == 2).all()


def test_other_tokenizers_are_refused(tmp_path):
    train_sentencepiece(["a text with some words in it " * 20], 280, tmp_path / "other.model")
    config = dataclasses.replace(CONFIG, vocab_size=280)
    save_constant(tmp_path / "first", 1.0, config=config, tokenizer=BYTES)
    save_constant(tmp_path / "second", 1.0, config=config, tokenizer=load_tokenizer(tmp_path / "other.model"))
    with pytest.raises(UserError, match="first and .*second have different tokenizers"):
        average([tmp_path / "first", tmp_path / "second"], tmp_path / "mean")


@pytest.mark.parametrize(
    "weights, words",
    [((1.0,), "--weights has 1 numbers and --source 2 paths"), ((1, 0), "--weights is 1, 0: each must be a positive"), ((1, np.inf), "finite")],
)
def test_weights_that_are_refused(tmp_path, weights, words):
    paths = [save_constant(tmp_path / name, 1.0) for name in ("first", "second")]
    with pytest.raises(UserError, match=words):
        average(paths, tmp_path / "mean", weights)


def test_checkpoints_that_are_not_there(tmp_path):
    workdir = save_run(tmp_path / "run", states(0, 1))
    with pytest.raises(UserError, match=r"has checkpoints of 2 steps \(10, 20\), not of 3: ask for fewer, or train with a larger checkpoint.keep"):
        average([workdir], tmp_path / "mean", last=3)
    with pytest.raises(UserError, match="--last is 0"):
        average([workdir], tmp_path / "mean", last=0)
    with pytest.raises(UserError, match="is no workdir of a training run"):
        average([save_constant(tmp_path / "model", 1.0)], tmp_path / "mean", last=1)
    with pytest.raises(UserError, match="checkpoints/30 does not exist"):
        average([workdir / "checkpoints" / "30"], tmp_path / "mean")
    (workdir / "checkpoints" / "20" / "record" / "metadata").write_text("{")
    with pytest.raises(UserError, match="checkpoints/20 is no readable checkpoint of a training run"):
        average([workdir / "checkpoints" / "20"], tmp_path / "mean")


def test_the_average_command(tmp_path):
    paths = [str(save_constant(tmp_path / name, value)) for name, value in (("a", 1.0), ("b", 2.0))]
    command = [sys.executable, "-m", "herd_jax.average", "--source", *paths, "--weights", "1", "3", "--target", str(tmp_path / "mean")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()[:2]] == [["0.2500", paths[0]], ["0.7500", paths[1]]]
    assert (canonical(tmp_path / "mean")["layers.down"] == 1.75).all()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "exists: name a new directory" in done.stderr
