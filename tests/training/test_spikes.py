"""What a run does at losses that are not finite or jump: the rule, and that skip and rewind are the same after an interruption."""

import json
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from run_configs import numbered_streams

from herd_jax.config import parse
from herd_jax.errors import UserError
from herd_jax.training import loop
from herd_jax.training.config import RunConfig, TrainConfig
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.spikes import LAG, MAX_REWINDS, Spikes
from herd_jax.training.state import State

WINDOW = 8


def metrics(loss, grad_norm=1.0):
    return {"loss": np.float32(loss), "grad_norm": np.float32(grad_norm)}


def spikes(on_spike="skip", factor=3.0, position=None):
    return Spikes(on_spike, factor, WINDOW, position or {})


def test_the_rule_by_hand():
    rule = spikes()
    for step in range(1, WINDOW + 1):
        assert rule.judge(step, metrics(step, 10 * step)) is None  # no window yet
    assert np.isinf(rule.limits(WINDOW + LAG - 1)).all()
    low, median, high = 2.75, 4.5, 6.25  # of 1 ... 8
    np.testing.assert_allclose(rule.limits(WINDOW + LAG), [median + 3 * (high - low), 10 * (median + 3 * (high - low))])
    rule.judge(WINDOW + 1, metrics(5, 5))
    assert rule.judge(WINDOW + LAG, metrics(14.9, 149)) is None
    assert rule.limits(WINDOW + LAG)[0] == 15  # the step itself has no say
    assert rule.judge(WINDOW + LAG + 1, metrics(1, 1000)).startswith(f"a spike at step {WINDOW + LAG + 1}: loss 1 (limit ")


def test_what_is_not_finite_is_wrong_and_forgotten():
    rule = spikes(factor=math.inf)
    steps = ((1, 1, 1), (2, math.nan, 1), (3, 1, math.inf), (4, 1e30, 1))
    verdicts = [rule.judge(step, metrics(loss, norm)) for step, loss, norm in steps]
    assert verdicts == [None, "not finite at step 2", "not finite at step 3", None]
    assert not rule.limits_steps and rule.record() == {}
    for step in (2, 3, 7):
        rule.note_skipped(step, step)
    assert rule.record() == {"skipped": [[2, 3], [7, 7]]}


def test_an_interrupted_run_decides_the_same():
    losses = np.random.default_rng(0).lognormal(0, 1, 200)
    whole = spikes(factor=1.0)
    verdicts = [whole.judge(step, metrics(loss, 2 * loss)) for step, loss in enumerate(losses, 1)]
    assert 5 < sum(verdict is not None for verdict in verdicts) < 100
    for stop in (1, 3, WINDOW, 50, 51, 120):
        rule = spikes(factor=1.0)
        again = [rule.judge(step, metrics(loss, 2 * loss)) for step, loss in enumerate(losses[:stop], 1)]
        rule = spikes(factor=1.0, position=json.loads(json.dumps(rule.record())))
        again += [rule.judge(step, metrics(loss, 2 * loss)) for step, loss in enumerate(losses[stop:], stop + 1)]
        assert again == verdicts


def test_a_step_beyond_its_limits_changes_only_the_count():
    steps = tiny.make_steps(dp=2, tp=2)
    batch = tiny.to_batch(steps, tiny.make_rows(), 2)
    state, found = steps.train(steps.plan.init(0), batch)
    loss, norm = float(found["loss"]), float(found["grad_norm"])
    for limits, good in (((np.inf, np.inf), True), ((loss, norm), True), ((loss * 0.99, np.inf), False), ((np.inf, norm * 0.99), False)):
        after, same = steps.train_within(steps.plan.init(0), batch, np.array(limits, np.float32))
        assert float(same["loss"]) == loss and bool(same["finite"])
        expected = state if good else State(jnp.int32(1), *steps.plan.init(0)[1:])
        chex.assert_trees_all_equal(after, expected)


@pytest.mark.parametrize("schedule", [dict(warmup_steps=10, weight_decay=0.0), dict(anneal_from=0, anneal_steps=2, weight_decay=0.0)])
def test_steps_left_out_move_the_schedule(schedule):
    """The rate that is applied is the one that is logged; Adam's own count, of its averages, is that of the updates."""
    steps = tiny.make_steps(**schedule)
    batch = tiny.to_batch(steps, tiny.make_rows(), 1)
    begin = steps.plan.init(0)
    first, plain = steps.train(steps.plan.init(0), batch)
    skipped, _ = steps.train_within(steps.plan.init(0), batch, np.zeros(2, np.float32))
    second, after_skip = steps.train(skipped, batch)
    assert int(second.optimizer[0].count) == 1 and int(second.step) == 2
    change = lambda state: jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, begin.params)
    ratio = float(after_skip["learning_rate"]) / float(plain["learning_rate"])
    assert ratio in (2, 0)
    tiny.assert_close(change(second), jax.tree.map(lambda delta: ratio * delta, change(first)), 1e-3)


def test_rewinds_to_one_step_come_to_an_end():
    rule = spikes("rewind")
    for _ in range(MAX_REWINDS):
        rule.rewind_to(4, "wrong")
    rule.rewind_to(8, "wrong")
    with pytest.raises(UserError, match=f"is wrong, after {MAX_REWINDS} rewinds to step 4"):
        rule.rewind_to(4, "wrong")


def test_batches_left_out_are_counted_and_recorded():
    rule = spikes("rewind", position={"step": 8, "skipped": [[5, 6]]})
    state = rule.leave_out(State(jnp.int32(8), {}, {}), 9, 11)
    assert int(state.step) == 11 and rule.record()["skipped"] == [[5, 6], [9, 11]]
    rule.load({"step": 4})
    assert "skipped" not in rule.record()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return numbered_streams(tmp_path_factory.mktemp("spikes"))


def trained(data, workdir, monkeypatch, bad, *num_steps, on_spike="rewind"):
    """(metrics lines, final position, final state) of a run that was ended after each of `num_steps`."""
    build = loop.build_steps

    def build_bad(config, mesh, task):
        steps = build(config, mesh, task)
        good = steps.train

        def train(state, batch):
            step = int(state.step) + 1
            state, metrics = good(state, batch)
            return state, (metrics | {"loss": metrics["loss"] * np.nan} if step in bad else metrics)

        steps.__dict__["train"] = train
        return steps

    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_steps", build_bad)
        for number in num_steps:
            config = parse(RunConfig, {
                "workdir": str(workdir), "data": {"sources": str(data)},
                "model": {"name": "llama-tiny", "dim": 32, "ffn_dim": 64, "num_layers": 1, "vocab_size": 259},
                "train": {"num_steps": number, "global_batch_size": 8, "seq_len": 32, "on_spike": on_spike},
                "checkpoint": {"every_steps": 4, "keep": 9}, "log": {"every_steps": 3}, "eval": {"num_batches": 1},
            })  # fmt: skip
            loop.train(config, NEXT_TOKEN)
    mesh = loop.make_mesh(config.mesh)
    steps = build(config, mesh, NEXT_TOKEN)
    checkpointer = loop.TieredCheckpointer(workdir / "checkpoints", config.checkpoint)
    restored = checkpointer.restore(steps.plan.abstract_canonical())
    checkpointer.close()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return lines, restored.position, restored.state


def test_rewind_leaves_out_the_batches_from_the_checkpoint_on(data, tmp_path, monkeypatch, capsys):
    bad = (7, 10)
    lines, position, state = trained(data, tmp_path / "whole", monkeypatch, bad, 14)
    assert position["step"] == 14 and position["skipped"] == [[5, 7], [9, 10]]
    assert int(state.step) == 14 and all(map(math.isfinite, (line["loss"] for line in lines)))
    out = capsys.readouterr().out
    assert "not finite at step 7: back to step 4, the batches of steps 5 to 7 are left out" in out
    _, position_again, state_again = trained(data, tmp_path / "again", monkeypatch, bad, 6, 9, 14)
    assert position_again == position
    chex.assert_trees_all_equal(state_again, state)
    assert "back to step 8, the batches of steps 9 to 10" in capsys.readouterr().out  # not to 9, where it was interrupted
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    for step in (12, 14):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step))
    _, position_again, state_again = trained(data, tmp_path / "again", monkeypatch, bad, 14)  # from 9, to 6, to 8 once more
    assert position_again == position
    chex.assert_trees_all_equal(state_again, state)
    _, _, undisturbed = trained(data, tmp_path / "undisturbed", monkeypatch, (), 14)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(undisturbed.params), strict=True))


def test_stop_names_the_step(data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not finite at step 6 and the last good checkpoint is of step 4"):
        trained(data, tmp_path / "run", monkeypatch, (6,), 14, on_spike="stop")


@pytest.mark.parametrize("field, value", [("on_spike", "ignore"), ("spike_factor", 0.0), ("spike_window", 3)])
def test_settings_that_cannot_be(field, value):
    with pytest.raises(UserError, match=f"train.{field} is "):
        TrainConfig(**{field: value})
