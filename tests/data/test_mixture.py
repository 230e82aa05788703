"""Whose turn it is: exact shares, each source's rows in order through all phases, the same from any row, and turns worked by hand."""

import json
from collections import Counter
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from herd_jax.config import parse, to_dict
from herd_jax.data.batches import TOKENS, mixture, stream_batches
from herd_jax.data.mixture import Mixture
from herd_jax.data.ramp import Phase, Ramp
from herd_jax.data.rows import DataConfig, MixPhase, TrainingRows, open_streams
from herd_jax.data.streams import StreamWriter, TokenStream
from herd_jax.errors import UserError
from herd_jax.mesh import MeshConfig, make_mesh

WEIGHTS = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 10**12) | st.just(0.25), min_size=1, max_size=9)


def turns(mixture, num_rows):
    return [mixture.locate(row) for row in range(num_rows)]


def furthest_from_share(weights, found):
    """The most by which, after any row, the rows of a source differ from its share of them."""
    exact = [Fraction(str(weight)) for weight in weights]
    share = np.array([float(weight / sum(exact)) for weight in exact])
    taken = np.cumsum([[source == s for s in range(len(weights))] for source, _ in found], axis=0)
    return np.abs(taken - share * np.arange(1, len(found) + 1)[:, None]).max()


def test_turns_by_hand():
    """3/4 of n rows, rounded (halves up), are 1 2 2 3, then 4 5 5 6: the light source comes third of four rows."""
    for weights in ([3, 1], [0.75, 0.25]):
        assert "".join("ab"[source] for source, _ in turns(Mixture([(0, weights)]), 12)) == "aabaaabaaaba"
    assert turns(Mixture([(0, [1, 3])]), 4) == [(1, 0), (1, 1), (0, 0), (1, 2)]
    assert turns(Mixture([(0, [2, 2])]), 4) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert turns(Mixture([(0, [0.5])]), 3) == [(0, 0), (0, 1), (0, 2)]


def test_the_papers_mix():
    """Section 3.1.2: of 100 rows 50, 25, 17 and 8, in every hundred, and never a row off in between."""
    weights = [0.50, 0.25, 0.17, 0.08]
    found = turns(Mixture([(0, weights)]), 1000)
    for first in range(0, 1000, 100):
        assert Counter(source for source, _ in found[first : first + 100]) == {0: 50, 1: 25, 2: 17, 3: 8}
    assert furthest_from_share(weights, found) < 1
    last = found[99][0]
    assert Mixture([(0, weights)]).locate(10**15 - 1) == (last, 10**13 * (50, 25, 17, 8)[last] - 1)


@given(WEIGHTS)
def test_shares_are_exact(weights):
    found = turns(Mixture([(0, weights)]), 400)
    assert furthest_from_share(weights, found) < (1 if len(weights) <= 3 else 1.7)


@st.composite
def phased(draw):
    num_sources = draw(st.integers(1, 5))
    firsts = [0, *sorted(draw(st.lists(st.integers(0, 120), max_size=4)))]
    weights = st.lists(st.sampled_from([0.0, 0.1, 1.0, 7.3]), min_size=num_sources, max_size=num_sources).filter(any)
    return [(first, draw(weights)) for first in firsts]


@given(phased())
def test_every_source_goes_on_where_it_was(phases):
    """Each source's rows are 0, 1, 2, ... through all phases, and only sources with a weight are read."""
    mixed = Mixture(phases)
    expected = [0] * len(phases[0][1])
    for row in range(200):
        source, of_source = mixed.locate(row)
        assert of_source == expected[source]
        assert [weights for first, weights in phases if first <= row][-1][source] > 0
        expected[source] += 1
    assert [mixed.locate(row) for row in range(199, -1, -7)] == [Mixture(phases).locate(row) for row in range(199, -1, -7)]


LENGTHS = {"a": 4001, "b": 1601, "c": 2401}  # 250, 100 and 150 rows of 16 tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sources whose tokens count up from 0, 10,000 and 20,000."""
    base = tmp_path_factory.mktemp("mixture")
    for index, (name, length) in enumerate(LENGTHS.items()):
        with StreamWriter(base / name / "train", 50_000) as writer:
            writer.append(10_000 * index + np.arange(length), np.array([length]), length)
    a, b, c = (str(base / name) for name in LENGTHS)
    # 160 and 480 tokens are 10 and 30 rows of 16.
    return DataConfig({a: 3, b: 1}, phases=(MixPhase(160, {c: 1, a: 1}), MixPhase(480, {b: 0.8, c: 0.2})))


def batches(config, ramp, num_steps):
    sharding = NamedSharding(make_mesh(MeshConfig(dp=1), jax.devices()[:1]), TOKENS)
    return stream_batches(config, open_streams(config, "train"), ramp, 7, num_steps, sharding)


def sources_of(batch):
    return (batch.blocks[0]["tokens"][..., 0] // 10_000).ravel().tolist()


def test_phases_begin_with_their_first_step(data):
    """Steps of 4 rows: 160 tokens are done before the third step is (192), 480 before the eighth (512)."""
    found = [sources_of(batches(data, Ramp((Phase(0, 4, 16, 1),)), 20)[step]) for step in range(20)]
    assert Counter(sum(found[:3], [])) == {0: 9, 1: 3}
    assert Counter(sum(found[3:8], [])) == {0: 10, 2: 10}
    assert Counter(sum(found[8:18], [])) == {1: 32, 2: 8}


def test_no_row_twice_before_its_epoch_ends(data):
    """Through three phases each row of a source is read once an epoch; the source that rested goes on."""
    made = batches(data, Ramp((Phase(0, 4, 16, 1),)), 50)
    firsts = [made[step].blocks[0]["tokens"][..., 0].ravel() for step in range(50)]
    of_source = {source: [token for token in np.concatenate(firsts).tolist() if token // 10_000 == source] for source in range(3)}
    assert len(of_source[0]) == 9 + 10 and len(set(of_source[0])) == 19
    assert len(of_source[1]) == 3 + 134 and len(set(of_source[1][:100])) == len(set(of_source[1])) == 100
    assert len(of_source[2]) == len(set(of_source[2])) == 10 + 34


def test_phases_with_a_ramp(data):
    """Lengths have rows of their own; each phase of the mixture begins in both where its first step stands."""
    ramp = Ramp((Phase(0, 4, 16, 1), Phase(320, 2, 32, 1), Phase(640, 4, 16, 1)))  # steps 0 to 4, 5 to 9, 10 on
    short, long = mixture(data, ramp, 16), mixture(data, ramp, 32)
    # The second phase begins at step 3, the third at 480 tokens: step 5 + ceil(160 / 64) = 8.
    assert [short.locate(row)[0] for row in (0, 11, 12, 19)] == [0, 0, 0, 2]
    assert Counter(short.locate(row)[0] for row in range(12, 20)) == {0: 4, 2: 4}
    assert Counter(long.locate(row)[0] for row in range(6)) == {0: 3, 2: 3}
    assert {long.locate(row)[0] for row in range(6, 10)} == {1, 2}
    assert {short.locate(row)[0] for row in range(20, 40)} == {1, 2}


def test_a_batch_depends_on_seed_and_step_alone(data):
    """Read on through two changes of the mixture, from the middle of a phase, or at random in a run of another length."""
    ramp = Ramp((Phase(0, 4, 16, 1), Phase(400, 2, 32, 1)))
    expected = [batch.blocks[0]["tokens"] for batch in batches(data, ramp, 16).iterate(0)]
    for first in (1, 3, 5, 9):
        for step, batch in enumerate(batches(data, ramp, 16).iterate(first), start=first):
            np.testing.assert_array_equal(batch.blocks[0]["tokens"], expected[step])
    longer = batches(data, ramp, 1000)
    for step in (11, 2, 7):
        np.testing.assert_array_equal(longer[step].blocks[0]["tokens"], expected[step])


def test_a_change_to_come_does_not_touch_what_is_before_it(data):
    """A phase, and a source, added while the run goes on: the steps before it read the same."""
    ramp = Ramp((Phase(0, 4, 16, 1),))
    before = DataConfig(data.sources)
    for step in range(3):
        np.testing.assert_array_equal(batches(before, ramp, 9)[step].blocks[0]["tokens"], batches(data, ramp, 9)[step].blocks[0]["tokens"])
    assert sources_of(batches(before, ramp, 9)[3]) != sources_of(batches(data, ramp, 9)[3])


def test_phases_are_checked(data):
    a = data.paths[0]
    for phases, message in (
        ([MixPhase(0, {a: 1})], r"data.phases start from \[0\] tokens"),
        ([MixPhase(20, {a: 1}), MixPhase(10, {a: 1})], r"data.phases start from \[20, 10\] tokens"),
        ([MixPhase(10, {a: 1}), MixPhase(20, {})], r"data.phases\[1\].sources is empty"),
        ([MixPhase(10, {a: 0})], r"data.phases\[0\].sources gives .* the weight 0"),
        ([MixPhase(10, {a + "x": 1})], "ax does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            open_streams(DataConfig(data.sources, phases=tuple(phases)), "train")


def test_phases_go_through_a_config(data):
    assert parse(DataConfig, json.loads(json.dumps(to_dict(data)))) == data
    assert data.paths == list(dict.fromkeys([*data.sources, *data.phases[0].sources]))


def test_reading_a_row_far_away_takes_no_longer(tmp_path):
    with StreamWriter(tmp_path / "s", 50_000) as writer:
        writer.append(np.arange(1000), np.array([1000]), 1000)
    rows = TrainingRows([TokenStream(tmp_path / "s")] * 2, Mixture([(0, [1, 2]), (10**12, [5, 1])]), 16, seed=0)
    assert rows[10**15]["tokens"].shape == (16,)
