"""The engine's answers against the plain forward of whole sequences, and against themselves with everything that must not change them."""

import dataclasses

import engines
import jax
import numpy as np
import pytest
import tiny

from herd_jax.errors import UserError
from herd_jax.inference.engine.build import EngineConfig
from herd_jax.inference.engine.compilations import num_compilations
from herd_jax.inference.engine.requests import Piece, Request
from herd_jax.inference.sampling import Sampling

MESHES = {(1, 1, 1, 1): {}, (2, 1, 1, 1): {}, (1, 2, 1, 1): {}, (1, 1, 2, 1): {}, (2, 1, 2, 1): {"guesses": 3}, (1, 1, 3, 1): {"micro_batches": 2}, (1, 1, 1, 2): {}}


@pytest.mark.parametrize("mesh", [pytest.param(m, marks=pytest.mark.slow) if m in ((2, 1, 1, 1), (1, 1, 2, 1)) else m for m in MESHES], ids=str)
def test_answers_are_those_of_the_plain_forward(mesh):
    """Greedy and sampled, with every filter and penalty, many at the same time, whatever the mesh."""
    requests = engines.mixed_requests()
    engine = engines.engine(mesh, strict=True, **MESHES[mesh])  # of few shapes, so that little is compiled
    for request, (answer,) in zip(requests, engines.run(engine, requests), strict=True):
        assert list(answer.ids) == engines.expected(request)
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("variant", ["alone", "without pages found", *(pytest.param(v, marks=pytest.mark.slow) for v in ("guessing", "in smaller chunks")), "as they grow"])
def test_nothing_else_changes_an_answer(variant):
    requests = engines.mixed_requests(12, seed=1)
    ids = lambda found: [[answer.ids for answer in answers] for answers in found]
    together = ids(engines.run(engines.engine(), requests))
    match variant:
        case "alone":
            found = [ids(engines.run(engines.engine(), [request]))[0] for request in requests]
        case "without pages found":
            found = ids(engines.run(engines.engine(), [dataclasses.replace(r, salt=str(i)) for i, r in enumerate(requests)]))
        case "guessing":
            found = ids(engines.run(engines.engine(guesses=3), requests))
        case "in smaller chunks":
            found = ids(engines.run(engines.engine(chunk_tokens=16, page_size=4), requests))
        case "as they grow":
            engine = engines.engine(reserve=False, max_tokens_in_cache=72)
            found = ids(engines.run(engine, requests))
            assert engine.scheduler.num_sent_back > 0
    assert found == together


def test_samples_of_a_prompt_are_computed_from_one_prefill():
    """Nine samples with six slots; each is what it is alone, and no page of the prompt is held twice."""
    engine, rng = engines.engine(), np.random.default_rng(3)
    request = Request(engines.ids(rng, 21), Sampling(6, temperature=1.0, seed=4), num_samples=9)
    (answers,) = engines.run(engine, [request])
    assert [list(answer.ids) for answer in answers] == [engines.expected(request, sample) for sample in range(9)]
    assert sum(answer.num_found == 21 for answer in answers) >= 5  # those that followed the first one at once
    (second,) = engines.run(engine, [dataclasses.replace(request, num_samples=1, first_sample=7)])
    assert second[0].ids == answers[7].ids and second[0].num_found == 16
    engine.submit(request)
    engine.step()
    held = engine.scheduler.pool
    assert held.num_held == 2 + 6 * 2  # two whole pages of the prompt for all, two for the rest and the answer of each
    engine.abort(list(engine._samples)[0])
    assert engines.is_empty(engine)


def test_log_probabilities():
    engine, rng = engines.engine(), np.random.default_rng(5)
    options = {"temperature": 0.7, "top_k": 9, "log_probs": 4, "logit_bias": {5: 3.0}}
    requests = [Request(engines.ids(rng, length), Sampling(5, **options), scores_prompt=i % 2 == 0) for i, length in enumerate((40, 7, 33, 2))]
    engines.run(engine, requests)  # of a prompt that is scored nothing is found, though it is there
    for request, (answer,) in zip(requests, engines.run(engine, requests), strict=True):
        whole = [*request.prompt, *answer.ids]
        raw = np.asarray(jax.nn.log_softmax(engines.logits(whole), -1))
        given = [*answer.prompt_log_probs, *answer.log_probs]
        assert [one.id for one in given] == (whole[1:] if request.scores_prompt else list(answer.ids))
        first = len(whole) - len(given)
        for i, one in enumerate(given):
            of_token = raw[first + i - 1]
            assert one.raw == pytest.approx(of_token[one.id], abs=1e-4)
            assert [token for token, *_ in one.likeliest] == np.argsort(-of_token)[:4].tolist()
            assert one.likeliest[0][1] == pytest.approx(of_token.max(), abs=1e-4)
        for i, one in enumerate(answer.log_probs):
            changed = raw[len(request.prompt) + i - 1] + 3.0 * (np.arange(61) == 5)
            kept = np.where(np.argsort(np.argsort(-changed)) < 9, changed, -np.inf) / 0.7
            assert one.processed == pytest.approx(kept[one.id] - np.log(np.exp(kept).sum()), abs=1e-4)


def test_a_steady_state_compiles_nothing():
    engine = engines.engine()
    requests = engines.mixed_requests(10, seed=6)
    engines.run(engine, requests)
    before = num_compilations()
    engines.run(engine, [dataclasses.replace(r, prompt=r.prompt[::-1]) for r in requests])
    assert num_compilations() == before


def test_a_warm_engine_compiles_little_for_plain_requests():
    """Only what puts requests into slots, which is small and depends on how many come at once."""
    engine = engines.engine(max_sequences=2, chunk_tokens=16)
    engine.warm_up()
    engines.run(engine, [Request([1, 2, 3], Sampling(2))])
    before = num_compilations()
    engines.run(engine, [Request(list(range(length)), Sampling(4, temperature=1.0)) for length in (5, 30, 9)])
    assert num_compilations() - before <= 1


def test_strict_answers_have_the_same_bits():
    """Alone and beside others, with pages found and computed, with guesses and without."""
    engine = engines.engine(strict=True, guesses=2, chunk_tokens=16, page_size=4)
    requests = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, log_probs=1)) for r in engines.mixed_requests(7, seed=7)]
    bits = lambda found: [[one.raw for one in answer.log_probs] for (answer,) in found]
    together = bits(engines.run(engine, requests))
    assert together == [bits(engines.run(engine, [request]))[0] for request in requests]
    assert together == bits(engines.run(engine, [dataclasses.replace(r, salt="other", speculates=False) for r in requests]))


def test_what_ends_an_answer():
    engine, rng = engines.engine(), np.random.default_rng(8)
    request = Request(engines.ids(rng, 9), Sampling(20))
    whole = engines.expected(request)
    stop = whole[7]
    first = whole.index(stop)
    (answer,) = engines.run(engine, [Request(request.prompt, Sampling(20, stop_ids=[stop]))])[0]
    assert list(answer.ids) == whole[: first + 1] and answer.finish_reason == "stop" and answer.stop == stop
    (answer,) = engines.run(engine, [Request(engines.ids(rng, 64), Sampling(5), scores_prompt=True)])[0]
    assert answer.ids == () and answer.finish_reason == "length" and len(answer.prompt_log_probs) == 63


def test_an_aborted_request_ends_and_its_pages_are_free():
    engine, rng = engines.engine(), np.random.default_rng(9)
    tickets = [engine.submit(Request(engines.ids(rng, 30), Sampling(30), num_samples=2)) for _ in range(8)]  # some wait for a slot
    for i in range(6):
        engine.step()
    for ticket in tickets[1:]:
        engine.abort(ticket)
    ended = [event for _ in range(80) for event in engine.step() if isinstance(event, Piece) and event.finish_reason]
    assert sorted((event.ticket, event.finish_reason) for event in ended) == sorted(
        [(tickets[0], "length")] * 2 + [(ticket, "abort") for ticket in tickets[1:] for _ in range(2)]
    )
    assert engines.is_empty(engine)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: Request([], Sampling(3)), "ids for which the model has no embedding, or none at all"),
        (lambda: Request([61], Sampling(3)), "ids for which the model has no embedding"),
        (lambda: Request([1] * 65, Sampling(3)), "the prompt is 65 tokens long: the model's context holds 64"),
        (lambda: Request([1], Sampling(3, logit_bias={61: 1})), "name token 61: the model's ids go up to 60"),
        (lambda: Request([1], Sampling(3), num_samples=0), "num_samples is 0"),
    ],
)
def test_requests_that_cannot_be_answered(request_, message):
    with pytest.raises(UserError, match=message):
        engines.engine().submit(request_())


def test_a_request_larger_than_the_cache():
    engine = engines.engine(max_tokens_in_cache=32)
    with pytest.raises(UserError, match="may take 41 tokens, and the cache holds 32: ask for fewer new tokens"):
        engine.submit(Request([1], Sampling(40)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequences": 0}, "max_sequences is 0: it must be 1 or more"),
        ({"guesses": 17}, "guesses is 17"),
        ({"strict": True, "reserve": False}, "strict needs reserve"),
        ({"max_length": 65}, "max_length is 65: the model's context holds 64"),
        ({"max_tokens_in_cache": 10**13}, r"the cache takes .* GB on each device and .* GB are free, .* GB too little: give a smaller max_tokens"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        engines.engine(**settings)


def test_defaults_fit_the_machine():
    assert EngineConfig().page_size == 64
    engine = engines.engine(max_tokens_in_cache=None, max_sequences=3)
    assert engine.scheduler.pool.num_pages == 1 + 3 * 8


def test_replicas_share_the_work_and_keep_prompts_together():
    engine, rng = engines.engine((1, 1, 1, 2), strict=True), np.random.default_rng(10)
    begin = engines.ids(rng, 24)
    engines.run(engine, [Request(begin + [1], Sampling(2))])
    holder = next(one for one in engine.engines if one.scheduler.pool.find(begin, ""))
    tickets = [engine.submit(Request(begin + [i], Sampling(2))) for i in range(2)]
    assert all(engine._where[ticket][0] is holder for ticket in tickets)
    for i in range(8):
        engine.submit(Request(begin + [i], Sampling(2)))
    assert {id(one) for one, _ in engine._where.values()} == {id(one) for one in engine.engines}
    while engine.has_work:
        engine.step()
    assert not engine._where and all(engines.is_empty(one) for one in engine.engines)


def test_tied_embeddings():
    config = tiny.tied()
    requests = engines.mixed_requests(3, seed=11)
    found = engines.run(engines.engine((2, 1, 1, 1), config, strict=True), requests)
    assert [list(answer.ids) for (answer,) in found] == [engines.expected(request, config=config) for request in requests]
