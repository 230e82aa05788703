"""What a resumed run may change, and what contradicts its checkpoint."""

import pytest
from run_configs import config, phases

from herd_jax.config import parse, to_dict
from herd_jax.errors import UserError
from herd_jax.training.config import RunConfig
from herd_jax.training.resume import changes, parse_saved


def contradictions(saved, run, tokens, known=None, identities=None):
    """The names of the fields in which configs (as `to_dict` has them) differ; `known`: what the checkpoint has of identities."""
    position = {"step": 1, "tokens": tokens} | ({"identities": known} if known else {})
    return [change.name for change in changes({"config": saved, "position": position}, parse(RunConfig, run), identities or {})]


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
        "data.sources", "seed", "model.dim", "train.seq_len", "optimizer.b2",
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


def of_data(sources, fingerprints, saved="data/a", known=None):
    """What contradicts a checkpoint of a run on `saved`, if the paths hold what `fingerprints` says."""
    identities = {"data": fingerprints, "init_from": {}}
    known = {"data": known, "init_from": {}} if known else None
    return contradictions(*(to_dict(config(data={"sources": value})) for value in (saved, sources)), 0, known, identities)


def test_data_is_known_by_its_content():
    assert not of_data("data/a", {"data/a": "1"}, known={"data/a": "1"})
    assert of_data("data/a", {"data/a": "2"}, known={"data/a": "1"}) == ["data.sources"]
    assert not of_data("/mnt/b", {"/mnt/b": "1"}, known={"data/a": "1"})  # moved
    two, known = "data/a:1,data/b:2", {"data/a": "1", "data/b": "2"}
    assert not of_data("x:1,y:2", {"x": "1", "y": "2"}, two, known)
    assert of_data("y:2,x:1", {"x": "1", "y": "2"}, two, known) == ["data.sources"]  # other rows, since sources take turns in order
    assert of_data("x:2,y:2", {"x": "1", "y": "2"}, two, known) == ["data.sources"]
    assert not of_data("x:1,y:2", {"x": "1", "y": "1"}, two, {"data/a": "1", "data/b": "1"})  # twice the same


def test_data_of_an_earlier_checkpoint_is_known_by_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for same in ("data/a", "./data/a", "data/a/", "data//a", "data/b/../a"):
        assert not of_data(same, {same: "1"})
    assert not of_data("/home/me/a", {"/home/me/a": "1"}, saved="~/a")
    for other in ("data/b", "/data/a", "a"):
        assert of_data(other, {other: "1"}) == ["data.sources"]


def test_initial_weights_are_known_by_their_content():
    def found(path, fingerprint):
        identities = {"data": {"data/test": "1"}, "init_from": {path: fingerprint} if path else {}}
        known = {"data": {"data/test": "1"}, "init_from": {"models/a": "1"}}
        return contradictions(to_dict(config(init_from="models/a")), to_dict(config(init_from=path)), 0, known, identities)

    assert not found("models/a", "1") and not found("/mnt/a", "1")
    assert found("models/a", "2") == found("", "") == ["init_from"]


def test_initial_weights_that_are_gone_are_known_by_their_name():
    """Of a run that began without saying what its init_from held, too."""
    for known in ({"models/a": "1"}, {}):
        position = {"data": {"data/test": "1"}, "init_from": known}
        now = {"data": {"data/test": "1"}, "init_from": {}}
        saved = to_dict(config(init_from="models/a"))
        assert not contradictions(saved, to_dict(config(init_from="./models/a")), 0, position, now)
        assert contradictions(saved, to_dict(config(init_from="models/b")), 0, position, now) == ["init_from"]


def test_what_was_before_is_said(tmp_path):
    record = {"config": to_dict(config()), "position": {"step": 1, "tokens": 0}}
    said = [str(change) for change in changes(record, config(model__dim=32, data__sources="data/other"), {"init_from": {}})]
    assert said == ["data.sources was {'data/test': 1.0}", "model.dim was 64"]


def test_allowed_names_are_names():
    assert config(resume__allow=("optimizer", "data.sources", "train.phases")).resume.allow[0] == "optimizer"
    with pytest.raises(UserError, match="resume.allow names 'optimizer.peak_learning_rat', which is no config key: did you mean 'optimizer.peak"):
        config(resume__allow="optimizer.peak_learning_rat")
