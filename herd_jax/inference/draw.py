"""The choice of the next token from logits, on the device and row by row, without sorting the vocabulary.

The order is Hugging Face's: temperature, top-k, top-p, min-p. Of equally likely tokens the one with the lower id stands first. What a row draws
depends on its logits, its options and its position alone: not on its number, nor on the rows beside it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

GREEDY_BELOW = 1e-5  # temperatures: a difference of logits, divided by less, is nothing or everything
NOT_FINITE = -1  # in place of a token
BLOCK = 256  # tokens that are summed before one of them is looked for
INFINITY_BITS = 0x7F800000  # of FP32: the bits of larger numbers are larger integers


class Options(NamedTuple):
    """How rows are drawn, one value each. A temperature below GREEDY_BELOW takes the likeliest token; top_k 0, top_p 1 and min_p 0 filter nothing."""

    seed_R2: jax.Array  # the upper and the lower half, uint32
    sample_R: jax.Array  # number of the sample among those of one prompt and seed
    temperature_R: jax.Array
    top_k_R: jax.Array
    top_p_R: jax.Array
    min_p_R: jax.Array


def scaled(logits_RV: jax.Array, options: Options) -> jax.Array:
    """Returns the logits less the row's largest, divided by the temperature, which is 1 for greedy rows: all are 0 or less."""
    temperature_R = jnp.where(options.temperature_R < GREEDY_BELOW, 1.0, options.temperature_R)
    return (logits_RV - logits_RV.max(-1, keepdims=True)) / temperature_R[:, None]


def kept(z_RV: jax.Array, options: Options) -> jax.Array:
    """Returns which tokens pass the filters, of `scaled` logits: bool [R, V]."""
    key_RV = lax.bitcast_convert_type(0 - z_RV, jnp.int32)  # grows as the probability falls
    e_RV, possible_RV = jnp.exp(z_RV), z_RV > -jnp.inf

    def top_k(keep_RV):
        k_R = jnp.where(options.top_k_R > 0, options.top_k_R, z_RV.shape[-1])
        count = lambda chosen_RV: (chosen_RV & keep_RV).sum(-1)
        bound_R1 = _smallest(lambda bits_R1: count(key_RV <= bits_R1) >= k_R, INFINITY_BITS, k_R)
        likelier_RV, equal_RV = keep_RV & (key_RV < bound_R1), keep_RV & (key_RV == bound_R1)
        return likelier_RV | _first(equal_RV, k_R - likelier_RV.sum(-1))

    def top_p(keep_RV):
        e_kept_RV = jnp.where(keep_RV, e_RV, 0)
        wanted_R = options.top_p_R * e_kept_RV.sum(-1)
        mass = lambda chosen_RV: jnp.where(chosen_RV, e_kept_RV, 0).sum(-1)
        bound_R1 = _smallest(lambda bits_R1: mass(key_RV <= bits_R1) >= wanted_R, INFINITY_BITS, wanted_R)
        likelier_RV, equal_RV = keep_RV & (key_RV < bound_R1), keep_RV & (key_RV == bound_R1)
        each_R = jnp.exp(-lax.bitcast_convert_type(bound_R1[:, 0], jnp.float32))
        number_R = jnp.maximum(jnp.ceil((wanted_R - mass(likelier_RV)) / jnp.maximum(each_R, 1e-38)), 1)
        cut_RV = likelier_RV | _first(equal_RV, jnp.where(number_R < z_RV.shape[-1], number_R, z_RV.shape[-1]).astype(jnp.int32))
        return jnp.where(options.top_p_R[:, None] < 1, cut_RV, keep_RV)

    keep_RV = lax.cond((options.top_k_R > 0).any(), top_k, lambda keep_RV: keep_RV, possible_RV)
    keep_RV = lax.cond((options.top_p_R < 1).any(), top_p, lambda keep_RV: keep_RV, keep_RV)
    return keep_RV & (e_RV >= options.min_p_R[:, None])


def choose(logits_RV: jax.Array, options: Options, position_R: jax.Array) -> jax.Array:
    """Returns the token of each row for its position in the sequence, int32 [R]: the likeliest, or one drawn from those that pass the filters.

    NOT_FINITE stands for a row whose logits are not numbers, or that has no token left.
    """
    V, most_R = logits_RV.shape[-1], logits_RV.max(-1)
    # The same as jnp.argmax, which is five times slower on CPU.
    likeliest_R = jnp.where(logits_RV == most_R[:, None], jnp.arange(V, dtype=jnp.int32), V - 1).min(-1)
    greedy_R = options.temperature_R < GREEDY_BELOW

    def drawn():
        z_RV = scaled(logits_RV, options)
        return _inverse(jnp.where(kept(z_RV, options), jnp.exp(z_RV), 0), uniforms(options, position_R))

    chosen_R = jnp.where(greedy_R, likeliest_R, lax.cond(greedy_R.all(), lambda: likeliest_R, drawn))
    return jnp.where(jnp.isfinite(most_R), chosen_R, NOT_FINITE)


def uniforms(options: Options, position_R: jax.Array) -> jax.Array:
    """Returns two numbers in [0, 1) a row, of its seed, sample and position alone: FP32 [R, 2]."""

    def of_row(seed_2, sample, position):
        key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, sample), position), (2,))

    return jax.vmap(of_row)(options.seed_R2, options.sample_R, position_R)


def _inverse(e_RV: jax.Array, uniform_R2: jax.Array) -> jax.Array:
    """Returns a token of each row with probability proportional to `e_RV`: first a block of tokens is drawn, then one of its tokens."""
    R, V = e_RV.shape
    e_RNV = jnp.pad(e_RV, ((0, 0), (0, -V % BLOCK))).reshape(R, -1, BLOCK)
    block_R = _place(e_RNV.sum(-1), uniform_R2[:, 0])
    e_RV = jnp.take_along_axis(e_RNV, block_R[:, None, None], 1)[:, 0]
    return block_R * BLOCK + _place(e_RV, uniform_R2[:, 1])


def _place(e_RN: jax.Array, uniform_R: jax.Array) -> jax.Array:
    """Returns the first place at which the running sum passes the row's share of the whole, int32 [R]; never one that has no weight."""
    N, sums_RN = e_RN.shape[-1], jnp.cumsum(e_RN, -1)
    places_N = jnp.arange(N, dtype=jnp.int32)
    passed_RN = (sums_RN > uniform_R[:, None] * sums_RN[:, -1:]) & (e_RN > 0)
    last_R = jnp.where(e_RN > 0, places_N, 0).max(-1)  # where rounding lets no sum pass
    return jnp.minimum(jnp.where(passed_RN, places_N, N).min(-1), last_R)


def _smallest(enough, largest: int, like_R: jax.Array) -> jax.Array:
    """Returns the smallest integer from 0 to `largest` for which `enough(integer [R, 1]) -> bool [R]` holds, by bisection: int32 [R, 1]."""

    def step(_, bounds):
        low_R1, high_R1 = bounds
        middle_R1 = low_R1 + (high_R1 - low_R1) // 2
        good_R1 = enough(middle_R1)[:, None]
        return jnp.where(good_R1, low_R1, middle_R1), jnp.where(good_R1, middle_R1, high_R1)

    start_R1 = jnp.zeros((len(like_R), 1), jnp.int32)
    return lax.fori_loop(0, largest.bit_length(), step, (start_R1 - 1, start_R1 + largest))[1]


def _first(chosen_RV: jax.Array, number_R: jax.Array) -> jax.Array:
    """Returns `chosen_RV` with only the first `number_R` of each row left."""

    def cut():
        ids_V = jnp.arange(chosen_RV.shape[-1])
        last_R1 = _smallest(lambda id_R1: (chosen_RV & (ids_V <= id_R1)).sum(-1) >= number_R, len(ids_V), number_R)
        return chosen_RV & (ids_V <= last_R1) & (number_R > 0)[:, None]

    return lax.cond((chosen_RV.sum(-1) > number_R).any(), cut, lambda: chosen_RV)


class Penalties(NamedTuple):
    """What changes a row's logits, one value each: repetition 1, presence 0 and frequency 0 change nothing; bias ids of V or more are empty places."""

    repetition_R: jax.Array
    presence_R: jax.Array
    frequency_R: jax.Array
    bias_ids_RN: jax.Array
    bias_RN: jax.Array


def penalised(logits_RV: jax.Array, seen_RV: jax.Array, count_RV: jax.Array, penalties: Penalties) -> jax.Array:
    """Returns the logits after repetition penalty (of tokens `seen` in prompt or answer), presence and frequency penalty (of an answer's tokens,
    `count` times each) and bias."""
    by_R1, presence_R1, frequency_R1 = (value_R[:, None] for value_R in penalties[:3])
    repeated_RV = jnp.where(logits_RV > 0, logits_RV / by_R1, logits_RV * by_R1)
    logits_RV = jnp.where(seen_RV, repeated_RV, logits_RV) - presence_R1 * (count_RV > 0) - frequency_R1 * count_RV
    add = lambda row_V, ids_N, bias_N: row_V.at[ids_N].add(bias_N, mode="drop")
    return jax.vmap(add)(logits_RV, penalties.bias_ids_RN, penalties.bias_RN)


@functools.partial(jax.jit, static_argnames="num_ids")
def draw(logits_RV: jax.Array, options: Options, position_R: jax.Array, num_ids: int | None = None) -> jax.Array:
    """Returns the next token of each row, as `choose` does after the filters; ids from `num_ids` on are never chosen (those that a tokenizer
    has no text for)."""
    return choose(among(logits_RV, num_ids), options, position_R)


def among(logits_RV: jax.Array, num_ids: int | None) -> jax.Array:
    """Returns the logits with those of ids from `num_ids` on at minus infinity."""
    return logits_RV if num_ids is None or num_ids >= logits_RV.shape[-1] else jnp.where(jnp.arange(logits_RV.shape[-1]) < num_ids, logits_RV, -jnp.inf)
