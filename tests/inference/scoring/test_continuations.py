"""Log-likelihoods of continuations, with what they share computed once, against a plain forward of each alone."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from herd_jax.errors import UserError
from herd_jax.inference.scoring import continuations
from herd_jax.inference.scoring.continuations import ContinuationScorer, families
from herd_jax.inference.scoring.packing import Unit, make_units, pack_units
from herd_jax.models.llama import Llama

CONFIG = dataclasses.replace(tiny.CONFIG, init_std=0.5)
RNG = np.random.default_rng(0)


def ids(size):
    return RNG.integers(0, CONFIG.vocab_size, size).tolist()


def requests():
    """Contexts with several continuations; one with one; some that begin alike; an only token; one longer than a row."""
    beginning = ids(9)
    contexts = [ids(7), ids(1), ids(12), *([*beginning, *ids(size)] for size in (1, 3, 5, 3, 2))]
    made = [(context, ids(size)) for context in contexts for size in (1, 1, 3, 5)]
    return [*made, (ids(3), ids(2)), (ids(2), ids(40))]


@pytest.fixture(scope="module")
def oracle():
    """Asked requests, and of each its log-likelihood and whether it is greedy, by a plain forward; the last is."""
    params = jax.tree.map(jax.numpy.asarray, tiny.canonical_params(tiny.make_steps(config=CONFIG)))
    segments, positions = np.ones((1, 48), np.int32), np.arange(48)[None]
    forward = jax.jit(lambda ids: tiny.plain_logits(params, {"tokens": ids, "segment_ids": segments, "positions": positions}, CONFIG)[0])
    log_p = lambda row: np.asarray(jax.nn.log_softmax(forward(np.pad(row, (0, 48 - len(row)))[None])))
    asked = requests()
    asked.append((asked[0][0], [int(log_p(asked[0][0])[len(asked[0][0]) - 1].argmax())]))
    known = []
    for context, continuation in asked:
        of_own = log_p([*context, *continuation])[len(context) - 1 :][: len(continuation)]
        known.append((of_own[np.arange(len(continuation)), continuation].sum(), bool((of_own.argmax(-1) == continuation).all())))
    return asked, known


@pytest.mark.parametrize("axes", [{}, {"tp": 2, "cp": 2, "dp": 2}, {"pp": 2, "dp": 2}])
def test_as_a_forward_of_each_alone(axes, oracle, monkeypatch):
    monkeypatch.setattr(continuations, "FAMILY_SIZE", 3)
    monkeypatch.setattr(continuations, "FAMILY_TOKENS", 6)
    monkeypatch.setattr(continuations, "RANK_TOKENS", 32)
    asked, known = oracle
    steps = tiny.make_steps(**axes, config=CONFIG)
    scorer = ContinuationScorer(Llama.make(CONFIG, "blockwise"), steps.layout, jax.numpy.float32)
    found = dict(scorer.score(steps.plan.init(0).params, asked))
    assert sorted(found) == list(range(len(asked)))
    for i, (log_p, greedy) in enumerate(known):
        assert found[i] == (pytest.approx(log_p, abs=2e-4), greedy)
    assert found[len(asked) - 1].greedy


def test_weights_that_are_no_numbers_are_refused():
    steps = tiny.make_steps(config=CONFIG)
    params = jax.tree.map(lambda w: w * np.nan, steps.plan.init(0).params)
    with pytest.raises(UserError, match="log-likelihoods are not finite: its weights are damaged"):
        list(ContinuationScorer(Llama.make(CONFIG, "blockwise"), steps.layout, jax.numpy.float32).score(params, [([1, 2], [3])]))


def test_families_share_the_longest_beginning_that_leaves_a_token_of_each_context():
    shared = tuple(range(70))
    contexts = [(*shared, *range(100, 100 + n)) for n in range(20)] + [(5, 6)] * 3
    (beginning, members), (none, others) = families(contexts)
    assert beginning == shared[:-1] and members == list(range(20))
    assert none == () and others == [20, 21, 22]
    assert families(contexts[:10]) == [((), list(range(10)))]


def test_packs_hold_every_unit_once_within_their_capacity():
    units = [unit for i in range(30) for unit in make_units(tuple(ids(1 + i)), [(i, ids(3)), (i, ids(1 + i % 7))], 20)]
    packs = pack_units(units, 20)
    assert sorted(map(id, units)) == sorted(id(unit) for pack in packs for unit in pack.units)
    assert all(pack.size <= 20 or len(pack.units) == 1 for pack in packs)
    assert len(packs) < len(units)


def test_a_context_comes_again_where_its_continuations_need_more_than_a_row():
    several = [(i, ids(6)) for i in range(5)]
    units = list(make_units((1, 2, 3), several, 16))
    assert [len(unit.continuations) for unit in units] == [2, 2, 1]
    assert Unit((1, 2, 3), several[:2]).size == 13
