"""The mix: shares and epochs worked by hand, caps that hold, and a config that trains as is, the same when interrupted at a change."""

import json
import random
import runpy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_jax.config import parse, read_command_line
from herd_jax.curation.mix import MAX_EPOCHS, MixConfig, MixSource, MixTarget, plan
from herd_jax.curation.write_mix import training_config
from herd_jax.data.tokenization import tokenize_files
from herd_jax.errors import UserError
from herd_jax.training.checkpoints.checkpoint import Checkpointer
from herd_jax.training.config import RunConfig
from herd_jax.training.loop import train
from herd_jax.training.next_token import NEXT_TOKEN

G, M, C, L = "general", "math_and_reasoning", "code", "multilingual"
WEB, BEST, MATH, CODE = MixSource("web", G, 8000), MixSource("best", G, 2000, 0.9), MixSource("math", M, 1000, 0.9), MixSource("code", C, 4000)
FRENCH = MixSource("fr", L, 1500)
ALL = [WEB, BEST, MATH, CODE, FRENCH]


def drawn(mix, phase=0):
    return {source.path: tokens for source, tokens in mix.phases[phase].drawn.items()}


def test_the_papers_mix():
    """4 epochs of math would be 25 % of 16,000 tokens."""
    mix = plan(ALL, MixConfig(total_tokens=16_000))
    assert mix.total_tokens == 16_000
    assert drawn(mix) == pytest.approx({"web": 6400, "best": 1600, "math": 4000, "code": 2720, "fr": 1280})
    assert mix.epochs() == pytest.approx({WEB: 0.8, BEST: 0.8, MATH: 4, CODE: 0.68, FRENCH: 1280 / 1500})
    assert not mix.phases[0].short()
    assert mix.data() == {"sources": {"web": 0.4, "best": 0.1, "math": 0.25, "code": 0.17, "fr": 0.08}, "phases": ()}


def test_without_a_total_the_others_give_what_a_category_cannot():
    """General text holds more than half of the 66,000 tokens of 4 epochs and is used up at 80,000; math and French were before."""
    mix = plan(ALL, MixConfig())
    assert drawn(mix) == pytest.approx({"web": 32_000, "best": 8000, "math": 4000, "code": 13_600, "fr": 6000})
    assert mix.total_tokens == 63_600


def test_a_little_of_a_category_changes_little():
    """The run is as long as without it, for each category that is added and whatever there is of it."""
    base = {G: 10_000_000, C: 5_000_000, L: 3_000_000}
    run = lambda tokens, **options: plan([MixSource(name, name, n) for name, n in tokens.items()], MixConfig(**options)).total_tokens
    assert run(base) == 60_000_000
    assert run(base | {M: 500}) == 60_002_000
    assert run(base | {M: 500}, max_epochs={G: 4, C: 4, L: 4, M: 1}) == 60_000_500
    for left_out in base:
        most = {name: tokens for name, tokens in base.items() if name != left_out}
        for few in (1, 100, 10_000):
            assert run(most) <= run(most | {left_out: few}) <= run(most) + 4 * few + 1
    lengths = [run(base | {M: 2**n}) for n in range(30)]
    assert lengths == sorted(lengths)  # more of a category never makes a run shorter


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=4))
def test_a_run_reads_half_of_what_can_be_read(tokens):
    mix = plan([MixSource(name, name, n) for name, n in zip((G, M, C, L), tokens)], MixConfig())
    assert 2 * sum(tokens) - 1 <= mix.total_tokens <= 4 * sum(tokens)


def test_what_stays_unused_is_said():
    table = str(plan(ALL, MixConfig(total_tokens=2000)))
    assert "the run reads 2K of the 16.5K tokens that there are at least once (12.1%)" in table
    assert "most of what there is stays unused: raise total_tokens" in table
    table = str(plan(ALL, MixConfig()))
    assert "the run reads 15.9K of the 16.5K" not in table and "at least once (100.0%)" in table and "stays unused" not in table


def test_what_a_category_cannot_give_the_others_do():
    """Of 20,000 tokens math gives 4,000 instead of 5,000; the others 16,000 in proportion 50 : 17 : 8."""
    mix = plan(ALL, MixConfig(total_tokens=20_000))
    reached = {name: mix.phases[0].drawn_of(name) for name in (G, M, C, L)}
    assert reached == pytest.approx({G: 16_000 * 50 / 75, M: 4000, C: 16_000 * 17 / 75, L: 16_000 * 8 / 75})
    assert mix.phases[0].short() == pytest.approx({M: 1000})
    assert "math_and_reasoning is 1K tokens short of its share: the others give more" in str(mix)


def test_a_category_that_is_not_there():
    """None of 8 %: the others give it."""
    mix = plan([WEB, BEST, MATH, CODE], MixConfig())
    assert mix.total_tokens == 40_000 + 4000 + 13_600
    assert mix.phases[0].short()[L] == pytest.approx(0.08 * mix.total_tokens)


def test_all_that_there_is():
    """More wanted than the caps allow: everything at its cap, and the missing tokens stated."""
    mix = plan(ALL, MixConfig(total_tokens=100_000))
    assert set(mix.epochs().values()) == {MAX_EPOCHS} and mix.total_tokens == 4 * 16_500
    assert "the sources give 66K of 100K tokens within max_epochs" in str(mix)


def test_caps_by_category():
    mix = plan(ALL, MixConfig(max_epochs={M: 2.0}))
    assert mix.total_tokens == 8000 and mix.epochs()[MATH] == 2  # the only category with an end
    with pytest.raises(UserError, match="neither total_tokens nor max_epochs"):
        plan(ALL, MixConfig(max_epochs={}))


def test_annealing_draws_more_of_what_is_good():
    """5 times as often: of general 8,000 x 1 and 2,000 x 5, so 4 : 5; with shares of its own and without multilingual text."""
    annealing = MixTarget(9000, {G: 0.4, M: 0.3, C: 0.3}, min_quality=0.8, upsample=5)
    mix = plan(ALL, MixConfig((MixTarget(), annealing), total_tokens=10_000))
    assert drawn(mix, 1) == pytest.approx({"web": 400 * 4 / 9, "best": 400 * 5 / 9, "math": 300, "code": 300, "fr": 0})
    assert mix.data()["phases"] == ({"from_tokens": 9000, "sources": {"web": 0.177778, "best": 0.222222, "math": 0.3, "code": 0.3}},)
    assert "multilingual: not in this mix" in str(mix)


def test_epochs_count_through_all_phases():
    """Math has given 2,250 of its 4,000 tokens when it becomes all there is, and the rest is less than wanted."""
    mix = plan(ALL, MixConfig((MixTarget(), MixTarget(9000, {M: 1})), total_tokens=11_000))
    assert mix.epochs()[MATH] == 4 and mix.total_tokens == 9000 + 1750
    with pytest.raises(UserError, match=r"needs 2K tokens from 9K on and max_epochs allows 1.75K: raise max_epochs"):
        plan(ALL, MixConfig((MixTarget(), MixTarget(9000, {M: 1}), MixTarget(11_000)), total_tokens=12_000))


SOURCES = st.lists(st.tuples(st.sampled_from([G, M, C, L]), st.integers(0, 10**13), st.none() | st.floats(0, 1)), min_size=1, max_size=8)


@given(SOURCES, st.integers(1, 10**14), st.none() | st.floats(0, 1), st.floats(0.1, 10))
def test_caps_hold_and_nothing_is_lost(found, total, min_quality, upsample):
    sources = [MixSource(str(i), *values) for i, values in enumerate(found)]
    if not any(source.tokens for source in sources):
        return
    mix = plan(sources, MixConfig((MixTarget(min_quality=min_quality, upsample=upsample),), total_tokens=total))
    assert all(epochs <= MAX_EPOCHS * (1 + 1e-9) for epochs in mix.epochs().values())
    expected = min(total, 4 * sum(source.tokens for source in sources))
    assert sum(drawn(mix).values()) == pytest.approx(expected, rel=1e-9, abs=1) and mix.total_tokens == pytest.approx(expected, abs=1)
    assert str(mix)


def test_the_table():
    lines = [line.split() for line in str(plan(ALL, MixConfig(total_tokens=16_000))).splitlines()]
    assert lines[0] == "from 0 to 16K tokens".split()
    assert lines[1] == "wanted reached tokens there are epochs".split()
    assert lines[2] == "general 50.0% 50.0% 8K 10K 0.80".split()
    assert lines[3] == "web 40.0% 6.4K 8K 0.80".split()
    assert "math: 4.00 of at most 4".split() in lines


def test_refusals():
    for make, message in (
        (lambda: MixTarget(shares={}), "shares is empty"),
        (lambda: MixTarget(shares={G: 0.0}), "shares gives general 0.0"),
        (lambda: MixTarget(upsample=0), "upsample is 0"),
        (lambda: MixConfig(()), r"targets start from \[\]"),
        (lambda: MixConfig((MixTarget(5),)), r"targets start from \[5\]"),
        (lambda: MixConfig((MixTarget(), MixTarget(0))), r"targets start from \[0, 0\]"),
        (lambda: MixConfig((MixTarget(), MixTarget(10)), total_tokens=10), "total_tokens is 10: it must be more than the last"),
        (lambda: MixConfig(max_epochs=0), "max_epochs is 0"),
        (lambda: MixConfig(max_epochs={M: -1.0}), "max_epochs is -1.0"),
        (lambda: plan([WEB, WEB], MixConfig()), "has a source twice among web, web"),
        (lambda: plan([MixSource("poems", "poetry", 10)], MixConfig()), "no tokens left for general, math_and_reasoning, code, multilingual"),
        (lambda: MixSource.open("nowhere", G), "nowhere/train does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            make()


def test_a_config_is_read():
    targets = [{}, {"from_tokens": 1e6, "shares": {M: 1}, "min_quality": 0.5}]
    read = parse(MixConfig, {"max_epochs": "3", "targets": targets, "total_tokens": "2e6"})
    assert read.max_epochs == 3 and read.targets[1] == MixTarget(10**6, {M: 1.0}, 0.5)
    assert parse(MixConfig, {"max_epochs": {M: 2}}).max_epochs == {M: 2.0}
    assert read.targets[0].shares == {G: 0.5, M: 0.25, C: 0.17, L: 0.08}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A token stream of bytes for each of three categories."""
    base, words = tmp_path_factory.mktemp("mix"), random.Random(0)
    vocabularies = {G: "the cat sat on a mat", M: "one plus two is three", C: "for i in range of x"}
    for category, vocabulary in vocabularies.items():
        (base / category).mkdir()
        for i in range(12):
            (base / category / f"{i}.txt").write_text(" ".join(words.choices(vocabulary.split(), k=120)))
        tokenize_files([str(base / category)], "bytes", base / "data" / category, validation_fraction=0.1, processes=1)
    return [MixSource.open(str(base / "data" / category), category) for category in vocabularies]


def results(workdir):
    """What the metrics of each step say, but for the clock; and the final state."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [{name: line.get(name) for name in ("step", "loss", "grad_norm", "tokens", "val_loss")} for line in lines]
    checkpointer = Checkpointer(workdir / "checkpoints", keep=3)
    path, record = checkpointer.newest()
    checkpointer.close()
    return steps, record["checksums"]


def test_a_run_across_changes_of_the_mixture(sources, tmp_path):
    """The written config trains as is. Stopped in its second phase, when the third was not yet thought of, and continued, it gives the same
    losses and weights bit for bit; a phase that has begun may not change."""
    config = MixConfig((MixTarget(shares={G: 3, C: 1}), MixTarget(1000, {G: 1, M: 1}), MixTarget(2000, {M: 1, C: 1})), total_tokens=3000)
    run = {
        "workdir": str(tmp_path / "whole"),
        "model": {"name": "llama-tiny", "dim": 32, "ffn_dim": 64, "num_layers": 1, "vocab_size": 259},
        "train": {"global_batch_size": 8, "seq_len": 32},
        "optimizer": {"peak_learning_rate": 1e-2, "warmup_steps": 2, "decay_steps": 12},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "eval": {"every_steps": 6, "num_batches": 1},
        "log": {"every_steps": 1},
    }
    mix, file = plan(sources, config), tmp_path / "configs" / "mix.py"
    training_config(mix, file, run)
    assert str(mix).splitlines()[2] in file.read_text()
    written = runpy.run_path(str(file))["get_config"]()
    assert written["train"]["num_steps"] == 12 and [phase["from_tokens"] for phase in written["data"]["phases"]] == [1000, 2000]

    def train_with(*overrides):
        train(read_command_line(RunConfig, ["--config", str(file), *(f"--config.{override}" for override in overrides)]), NEXT_TOKEN)

    train_with()
    parts = f"workdir={tmp_path / 'parts'}"
    train_with(parts, f"data.phases={written['data']['phases'][:1]}", "train.num_steps=6")  # phases begin at steps 4 and 8
    with pytest.raises(UserError, match="were made with other values of data.phases"):
        train_with(parts, "data.phases=()")
    train_with(parts)
    (whole, state), (continued, continued_state) = results(tmp_path / "whole"), results(tmp_path / "parts")
    assert continued == whole and continued_state == state
    assert len(whole) == 12 and np.isfinite([line["loss"] for line in whole]).all()
