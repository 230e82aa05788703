"""The value of a small data set: the half-trained checkpoint, two anneals that differ in nothing but the mixture, the numbers written."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from herd_jax.config import parse
from herd_jax.data.rows import MixPhase, load_data_tokenizer, open_streams, validation_rows
from herd_jax.data.tokenization import tokenize_files
from herd_jax.errors import UserError
from herd_jax.evaluation.dataset_value import SourceLoss, _annealed, _half_trained, dataset_value, half_interval, held_out_losses
from herd_jax.evaluation.evaluation import Evaluation
from herd_jax.evaluation.results import read_results
from herd_jax.interop.load import load_params, open_source
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.training.config import RunConfig, build_steps
from herd_jax.training.loop import train
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.validation import HeldOutLoss, Validation

LETTERS = {"prose": "abcd ", "code": "(){};", "candidate": "0123456789+"}


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Three sources of different letters, and a run of 16 steps on the first two."""
    base, rng = tmp_path_factory.mktemp("value"), np.random.default_rng(0)
    for name, letters in LETTERS.items():
        (base / "text" / name).mkdir(parents=True)
        for i in range(40):
            (base / "text" / name / f"{i}.txt").write_text("".join(rng.choice(list(letters), 130)))
        tokenize_files([str(base / "text" / name)], "bytes", base / name, validation_fraction=0.2, processes=1)
    config = {
        "workdir": str(base / "run"),
        "data": {"sources": {str(base / "prose"): 3.0, str(base / "code"): 1.0}},
        "model": {"name": "llama-tiny", "dim": 32, "ffn_dim": 64, "num_layers": 1, "vocab_size": 259},
        "train": {"num_steps": 16, "global_batch_size": 8, "seq_len": 32, "watchdog": {"enabled": False}},
        "optimizer": {"peak_learning_rate": 1e-2, "final_learning_rate": 1e-3, "warmup_steps": 2, "decay_steps": 16},
        "checkpoint": {"every_steps": 3, "keep": 10},
        "eval": {"every_steps": 100, "num_batches": 2},
        "log": {"every_steps": 1},
    }
    train(parse(RunConfig, config), NEXT_TOKEN)
    return base


def value(base, output, run="run", candidate="candidate", mesh=None, **options):
    return dataset_value(Evaluation(base / run, output, mesh), str(base / candidate), **options)


@pytest.fixture(scope="module")
def done(base):
    """(what was printed, where it was written) of 8 steps of annealing."""
    return value(base, base / "out", num_tokens=8 * 256, held_out=[str(base / "code")]), base / "out"


def test_the_anneals_begin_at_half_and_end_at_zero(base, done):
    """Step 9 is nearest to 8; both go on with its optimizer, so that the first step of the control is the run's own but for the rate."""
    _, output = done
    run, default, candidate = (metrics(path) for path in (base / "run", output / "dataset-value/default", output / "dataset-value/candidate"))
    assert [line["step"] for line in default] == [line["step"] for line in candidate] == list(range(10, 18))
    assert default[0]["loss"] == run[9]["loss"] != candidate[0]["loss"]
    at_nine = run[8]["learning_rate"]
    for lines in (default, candidate):
        assert [line["learning_rate"] for line in lines] == pytest.approx([at_nine * left / 8 for left in range(7, -1, -1)], rel=1e-5)


def test_the_candidate_is_learned_where_it_is_in_the_mixture(done):
    printed, output = done
    record = read_results(output)["dataset-value"]
    table = record["results"]["bits_per_byte"]
    assert list(table) == sorted(["prose", "code", "candidate", "default mix"])
    assert table["candidate"]["difference"] == table["candidate"]["candidate"] - table["candidate"]["default"] < -0.1
    assert table["default mix"]["default"] < table["default mix"]["before"]
    for line in printed.splitlines()[2:6]:
        *name, before, default, with_candidate, difference, plus_minus, half = line.split()
        row = table[" ".join(name)]
        assert [float(before), float(default), float(with_candidate), float(difference), float(half)] == pytest.approx(
            [row["before"], row["default"], row["candidate"], row["difference"], row["half_interval"]], abs=1e-4
        )
        assert plus_minus == "±" and 0 < row["half_interval"]
    assert "from step 9 (56% of the run) for 2,048 tokens, 30% of them from" in printed


def test_the_losses_are_those_of_validation(base):
    """In groups of a row, or of one on each dp rank, the last of which is filled up."""
    _, config = _half_trained(base / "run")
    rows = validation_rows(open_streams(config.data, "validation"), 32, 2 * 8 * 2)
    num_rows = {Path(path).name: len(of_source) for path, of_source in zip(config.data.paths, rows, strict=True)}
    for mesh in (MeshConfig(tp=2, cp=4, dp=1), MeshConfig(dp=8)):
        config = dataclasses.replace(config, mesh=mesh)
        (found,) = held_out_losses([base / "run"], config, config.data.paths)
        steps, streams = build_steps(config, make_mesh(config.mesh), NEXT_TOKEN), open_streams(config.data, "validation")
        four = dataclasses.replace(config, eval=dataclasses.replace(config.eval, num_batches=4))
        validation = Validation(four, steps, streams, load_data_tokenizer(config.data, streams))
        params = load_params(open_source(base / "run"), steps.layout, steps.model.declared, jnp.float32)
        expected = validation.by_source(params, config.train.ramp.phases[0])
        for name, loss in found.items():
            total = HeldOutLoss.total(loss.groups)
            assert total == pytest.approx(expected[name], rel=1e-5) and loss.bits_per_byte == total.bits_per_byte
            assert len(loss.groups) == -(-num_rows[name] // mesh.dp) > 1


def test_the_interval_of_a_difference():
    """By hand: 8 bits fewer over 10 bytes and 4 over 10 are 0.6 a byte, with residuals 2 and 2, and 12.706 is Student's for two groups; and
    as the bootstrap has it."""
    made = lambda bits, sizes: SourceLoss([HeldOutLoss(b * math.log(2), 5, size) for b, size in zip(bits, sizes, strict=True)])
    default, candidate = made([20, 20], [10, 10]), made([12, 16], [10, 10])
    assert half_interval(default, candidate) == pytest.approx(12.706 * math.sqrt(2 * (2**2 + 2**2)) / 20, rel=1e-4)
    assert half_interval(made([20], [10]), made([12], [10])) is None
    rng = np.random.default_rng(0)
    sizes, bits = rng.integers(50, 150, 200), rng.normal(100, 30, 200)
    change = rng.normal(-10, 3, 200) * sizes / 100
    picked = rng.integers(200, size=(4000, 200))
    expected = 1.972 * (change[picked].sum(1) / sizes[picked].sum(1)).std()
    assert half_interval(made(bits, sizes), made(bits + change, sizes)) == pytest.approx(expected, rel=0.05)


def test_the_settings_say_what_was_done(base, done):
    record = read_results(done[1])["dataset-value"]
    settings = record["settings"]
    assert settings["checkpoint_step"] == 9 and settings["steps"] == 8 and settings["tokens"] == 2048
    names = {path.rsplit("/", 1)[1]: share for path, share in settings["data"].items()}
    assert names == pytest.approx({"prose": 0.7 * 0.75, "code": 0.7 * 0.25, "candidate": 0.3})
    assert 0 < record["results"]["candidate_epochs"] < 1


def test_the_same_command_has_nothing_left_to_train(base, done):
    """On another mesh the numbers are the same."""
    _, output = done
    table = read_results(output)["dataset-value"]["results"]["bits_per_byte"]
    before = (output / "dataset-value/default/metrics.jsonl").read_bytes()
    value(base, output, num_tokens=8 * 256, held_out=[str(base / "code")], mesh=MeshConfig(tp=2, dp=4))
    again = read_results(output)["dataset-value"]["results"]["bits_per_byte"]
    for name, row in again.items():  # but for the interval, of which each dp rank's rows are a part
        assert row | {"half_interval": 0} == pytest.approx(table[name] | {"half_interval": 0}, abs=1e-5)
    assert again.keys() == table.keys()
    assert (output / "dataset-value/default/metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="made with other values of optimizer.anneal_steps"):
        value(base, output, num_tokens=4 * 256)


def test_the_mixtures_and_the_default_length(base):
    """In a run whose mixture has changed and will change: the one that it has at the checkpoint. A tenth of the tokens so far."""
    _, config = _half_trained(base / "run")
    phases = tuple(MixPhase(tokens, {source: 2.0}) for tokens, source in ((512, "early"), (9 * 256 + 1, "later")))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, phases=phases))
    default, candidate = (_annealed(config, 9, None, chosen, 0.3) for chosen in (None, "early"))
    assert default.data.phases == phases[:1] and default.train.num_steps == candidate.train.num_steps == 10
    assert candidate.data.phases == (*phases[:1], MixPhase(9 * 256, {"early": 1.0}))
    assert _annealed(config, 9, None, "new", 0.3).data.phases[-1].sources == {"early": 0.7, "new": 0.3}


def test_what_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="--share is 1.0"):
        value(base, tmp_path, share=1.0)
    with pytest.raises(UserError, match="--tokens is 0"):
        value(base, tmp_path, num_tokens=0)
    with pytest.raises(UserError, match="none has no readable checkpoint: --run is the workdir"):
        value(base, tmp_path, run="none")
    with pytest.raises(UserError, match="data source .*missing does not exist: make it with"):
        value(base, tmp_path, candidate="missing")
    with pytest.raises(UserError, match="data source .*missing does not exist"):
        value(base, tmp_path, held_out=[str(base / "missing")])
    assert not list(tmp_path.iterdir())


def test_a_run_that_kept_only_its_end(base, tmp_path):
    """The nearest to half that there is."""
    shutil.copytree(base / "run", tmp_path / "run", ignore=shutil.ignore_patterns("3", "6", "9", "12", "15"))
    checkpoint, config = _half_trained(tmp_path / "run")
    assert checkpoint.name == "16" and config.train.num_steps == 16
    assert _half_trained(base / "run")[0].name == "9"
