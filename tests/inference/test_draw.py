"""Draws against a plain numpy definition: which tokens each filter keeps, and how often each of them comes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from herd_jax.errors import UserError
from herd_jax.inference.draw import NOT_FINITE, Options, Penalties, choose, draw, kept, penalised, scaled
from herd_jax.inference.sampling import Sampling

FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
]


def plain_kept(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Sorts; of equal logits the lower id comes first."""
    z = (logits_V.astype(np.float64) - logits_V.max()) / temperature
    order = np.argsort(-z, kind="stable")
    e = np.exp(z[order])
    keep = np.isfinite(z[order])
    keep &= np.arange(len(z)) < (top_k or len(z))
    before = np.cumsum(e * keep) - e * keep
    keep &= (before < top_p * (e * keep).sum() * (1 - 1e-7)) | (top_p == 1)
    keep &= e >= min_p
    found = np.zeros(len(z), bool)
    found[order[keep]] = True
    return found


def rows(rng, number, V, ties):
    logits = rng.normal(size=(number, V)).astype(np.float32) * 3
    return np.round(logits) if ties else logits


def options_of(some):
    return Options(*map(np.concatenate, zip(*(Sampling(1, **options).options() for options in some))))


@pytest.mark.parametrize("ties", [False, True])
def test_filters_keep_what_the_definition_keeps(ties):
    """Each row of a batch has filters of its own."""
    rng = np.random.default_rng(0)
    some = [{"temperature": float(rng.uniform(0.3, 2)), "top_k": int(rng.choice([0, 1, 2, 5, 40, 299, 300, 1000])),
             "top_p": float(rng.choice([1.0, 1e-6, 0.3, 0.9, 0.999])), "min_p": float(rng.choice([0, 0, 0.01, 0.3, 1]))} for _ in range(200)]  # fmt: skip
    logits = rows(rng, len(some), 300, ties)
    logits[::3, ::2] = -np.inf  # such as a grammar forbids
    options = options_of(some)
    found = np.asarray(jax.jit(lambda l, o: kept(scaled(l, o), o))(logits, options))
    for row, (of_row, asked) in enumerate(zip(found, some)):
        np.testing.assert_array_equal(of_row, plain_kept(logits[row], **asked), err_msg=str(asked))


@pytest.mark.parametrize("asked", FILTERS, ids=str)
def test_draws_follow_the_distribution(asked):
    """Chi-square over 10^5 draws, of 600 tokens, which are three blocks."""
    number, logits = 100_000, rows(np.random.default_rng(1), 1, 600, False)
    options = Sampling(1, seed=5, **asked).options(1)
    draws = jax.jit(lambda i: jax.vmap(lambda position: choose(logits, options, position[None])[0])(i * 1000 + jnp.arange(1000)))
    found = np.bincount(np.concatenate([draws(i) for i in range(number // 1000)]), minlength=600)
    weights = np.where(plain_kept(logits[0], **asked), np.exp(logits[0].astype(np.float64) / asked["temperature"]), 0)
    expected = number * weights / weights.sum()
    assert found[expected == 0].sum() == 0
    common = expected >= 5
    observed, wanted = np.append(found[common], found[~common].sum()), np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert abs(chi_square - freedom) < 4.5 * np.sqrt(2 * freedom) + 10, (chi_square, freedom)


def test_a_row_draws_the_same_whatever_stands_beside_it():
    logits = rows(np.random.default_rng(0), 64, 1000, False)
    some = [{"temperature": [0.0, 1.0][i % 2], "top_p": [1.0, 0.9][i % 3 == 0], "seed": i, "top_k": i} for i in range(64)]
    position = np.arange(64) + 7
    together = np.asarray(draw(logits, options_of(some), position))
    for i in (0, 1, 2, 3, 21, 63):
        assert draw(logits[i : i + 1], options_of(some[i : i + 1]), position[i : i + 1])[0] == together[i]
    assert together[0] == logits[0].argmax()


def test_a_draw_depends_on_seed_sample_and_position():
    logits = np.zeros((4, 50_000), np.float32)
    one = lambda position=3, sample=0, **options: draw(logits, Sampling(1, temperature=1.0, **options).options(4, sample), np.full(4, position)).tolist()
    found = [one(), one(seed=1), one(seed=2**32), one(position=4), one(sample=1)]
    assert all(len(set(tokens)) == 1 for tokens in found) and len({tokens[0] for tokens in found}) == 5
    assert one() == found[0]


def test_tokens_that_no_text_has_and_rows_that_are_not_numbers():
    logits = np.array([[1, 2, 9], [np.nan, 0, 0], [np.inf, 0, 0], [-np.inf] * 3], np.float32)
    for temperature in (0.0, 1.0):
        found = np.asarray(draw(logits, Sampling(1, temperature=temperature).options(4), np.arange(4), num_ids=2))
        assert found[0] in (0, 1) and (found[1:] == NOT_FINITE).all()


def test_penalties():
    logits = np.array([[2.0, -2.0, 1.0, 0.5]], np.float32)
    seen, count = np.array([[True, True, False, True]]), np.array([[0, 2, 0, 1]])
    arrays = Penalties(*(np.array([value], np.float32) for value in (2.0, 0.5, 0.25)), np.array([[2, 9, 2]]), np.array([[1.0, 7.0, 2.0]], np.float32))
    np.testing.assert_allclose(penalised(logits, seen, count, arrays)[0], [1.0, -4 - 0.5 - 0.5, 4.0, 0.25 - 0.5 - 0.25])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k is -1: it must be a whole number, 0"),
        ({"min_p": 1.5}, "min_p is 1.5: it must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be a number above 0"),
        ({"presence_penalty": 3}, "presence_penalty is 3: it must be a number from -2 to 2"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'"),
        ({"logit_bias": {"1": 2}}, "a token of logit_bias is '1'"),
        ({"logit_bias": {1: 200}}, "the logit_bias of token 1 is 200: it must be a number from -100 to 100"),
        ({"logit_bias": [1]}, "logit_bias must give numbers by token id"),
        ({"log_probs": 21}, "log_probs is 21: it must be a whole number from 0 to 20"),
        ({"stop_ids": [-1]}, "a token of stop_ids is -1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
