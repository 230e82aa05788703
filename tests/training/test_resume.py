"""What a resumed run may change, and what contradicts its checkpoint."""

import pytest
from run_configs import config, phases

from herd_jax.config import to_dict
from herd_jax.errors import UserError
from herd_jax.training.resume import contradictions, parse_saved


def changed(**overrides):
    return contradictions(to_dict(config()), to_dict(config(**overrides)), tokens=0)


def test_the_config_of_an_earlier_checkpoint_is_read():
    """With a field that has become another one, and without one that came later; any other unknown field is an error."""
    run = config(train__num_steps=7)
    saved = to_dict(run)
    saved["train"]["skip_nonfinite"] = True
    del saved["train"]["on_spike"]
    assert parse_saved(saved) == run and not contradictions(saved, to_dict(run), tokens=0)
    saved["model"]["num_heads_of_the_future"] = 3
    with pytest.raises(UserError, match="unknown config key 'model.num_heads_of_the_future'"):
        parse_saved(saved)


def test_contradictions_are_named():
    assert changed(seed=1, model__dim=32, optimizer__b2=0.9, train__seq_len=64, data__sources="data/other") == [
        "data.sources.data/test", "seed", "model.dim", "train.seq_len", "optimizer.b2", "data.sources.data/other",
    ]  # fmt: skip
    assert changed(train__global_batch_size=16) == ["train.global_batch_size"]
    assert changed(train__phases=phases()) == ["train.phases"]
    assert changed(model__rope_scaling={"factor": 2.0}) == ["model.rope_scaling", *[f"model.rope_scaling.{name}" for name in (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position")]]  # fmt: skip


def test_what_a_resume_may_change():
    assert not changed(
        workdir="runs/moved", mesh__tp=2, mesh__cp=2, mesh__dp=2, train__num_steps=5, train__num_micro_batches=2,
        train__remat="layer", train__gather="layer", train__attention="dense", train__compute_dtype="float32",
        train__on_spike="skip", eval__every_steps=3, log__every_steps=7, checkpoint__every_steps=2, checkpoint__keep=1,
    )  # fmt: skip


def test_a_resume_may_change_the_micro_batches_of_phases():
    saved, run = (to_dict(config(train__phases=phases(num_micro_batches=n))) for n in (2, 4))
    assert saved != run and not contradictions(saved, run, tokens=0)


def test_the_mixture_may_change_in_what_is_to_come():
    """After 500 tokens: phases from 500 on are free, also in a config that knew of none."""

    def mixed(*starts, weight=1.0):
        return to_dict(config(data={"sources": "data/test", "phases": [{"from_tokens": n, "sources": {"data/test": weight}} for n in starts]}))

    assert not contradictions(mixed(100), mixed(100, 500, 900), tokens=500)
    assert contradictions(mixed(100), mixed(100, 499), tokens=500) == ["data.phases"]
    assert contradictions(mixed(100), mixed(100, weight=2.0), tokens=500) == ["data.phases"]
    assert contradictions(mixed(), mixed(100), tokens=500) == ["data.phases"]
    older = {**mixed(), "data": {name: value for name, value in mixed()["data"].items() if name != "phases"}}
    assert not contradictions(older, mixed(500), tokens=500)


def test_annealing_may_change_while_it_is_to_come():
    """A step has 1024 tokens. Checkpoints that are older than annealing know of none."""

    def annealed(anneal_from, anneal_steps=10):
        return to_dict(config(train__num_steps=100, optimizer__warmup_steps=5, optimizer__anneal_from=anneal_from, optimizer__anneal_steps=anneal_steps))

    tokens = config().train.ramp.tokens_before(100)
    assert not contradictions(annealed(0, 0), annealed(100), tokens)
    assert not contradictions(annealed(100, 5), annealed(200), tokens)
    assert contradictions(annealed(0, 0), annealed(99), tokens) == ["optimizer.anneal_from", "optimizer.anneal_steps"]
    assert contradictions(annealed(99, 5), annealed(99, 6), tokens) == ["optimizer.anneal_steps"]
    older = annealed(0, 0)
    older["optimizer"] = {name: value for name, value in older["optimizer"].items() if not name.startswith("anneal")}
    assert not contradictions(older, annealed(100), tokens) and contradictions(older, annealed(99), tokens)
