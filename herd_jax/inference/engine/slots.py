"""What the device knows of the sequences it works on: a row for each slot, and one more that padding uses.

It is enough for the device to go on without the host: a step is told the numbers of the slots, and finds ids, positions and options here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from herd_jax.inference.draw import Options, Penalties
from herd_jax.inference.sampling import MAX_BIASES, Sampling

NO_TOKEN = 2**30  # an id that no vocabulary has


class Slots(NamedTuple):
    """One value a slot, or one row. The first `length` of `tokens` are the sequence; `drafted` guesses of what follows stand behind them."""

    tokens: jax.Array  # ids [slots, S]
    table: jax.Array  # pages [slots, N]
    computed: jax.Array  # tokens whose keys and values are in the pages, or under way
    length: jax.Array
    drafted: jax.Array
    limit: jax.Array  # tokens at which the sequence ends
    num_prompt: jax.Array
    speculates: jax.Array
    log_probs: jax.Array  # whether any are asked for
    options: Options
    penalties: Penalties
    adjusts: jax.Array  # whether the penalties change anything


def empty(num_slots: int, max_length: int, num_pages: int) -> Slots:
    """Returns slots that hold nothing, as numpy arrays: `num_slots` and the one for padding."""
    return Slots(*jax.tree.map(lambda a: np.repeat(a, num_slots + 1, 0), row(Sampling(), [], 0, 0, [], max_length, num_pages)))


def row(
    sampling: Sampling, ids, num_prompt: int, limit: int, pages, max_length: int, max_pages: int, computed: int = 0, sample: int = 0,
    speculates: bool = False,
) -> Slots:  # fmt: skip
    """Returns the row of one sequence, numpy arrays [1, ...]."""
    fill = lambda values, size, dtype, rest=0: np.concatenate([np.asarray(values, dtype), np.full(size - len(values), rest, dtype)])[None]
    number = lambda value, dtype=np.int32: np.array([value], dtype)
    bias = sampling.logit_bias
    penalties = Penalties(
        number(sampling.repetition_penalty, np.float32), number(sampling.presence_penalty, np.float32), number(sampling.frequency_penalty, np.float32),
        fill(list(bias.keys()), MAX_BIASES, np.int32, NO_TOKEN), fill(list(bias.values()), MAX_BIASES, np.float32),
    )  # fmt: skip
    plain = sampling.repetition_penalty == 1 and not (sampling.presence_penalty or sampling.frequency_penalty or bias)
    return Slots(
        fill(ids, max_length, np.int32), fill(pages, max_pages, np.int32), number(computed), number(len(ids)), number(0), number(limit),
        number(num_prompt), number(speculates, np.bool_), number(sampling.log_probs is not None, np.bool_), sampling.options(1, sample),
        penalties, number(not plain, np.bool_),
    )  # fmt: skip


def look_up(slots: Slots, slot_A: jax.Array, num_guesses: int) -> tuple[Slots, jax.Array]:
    """Returns slots with guesses behind their tokens, and how many: what followed the last two tokens when they came before, the last time. Where
    the text ends before there are enough, it is taken to go on as it did since then."""
    if not num_guesses:
        return slots, jnp.zeros_like(slot_A)
    tokens_AS, length_A1, index_S = slots.tokens[slot_A], slots.length[slot_A][:, None], jnp.arange(slots.tokens.shape[1])
    last = lambda back: jnp.take_along_axis(tokens_AS, jnp.maximum(length_A1 - back, 0), 1)
    same_AS = (tokens_AS == last(1)) & (jnp.roll(tokens_AS, 1, 1) == last(2)) & (index_S >= 1) & (index_S < length_A1 - 1)
    found_A1 = jnp.where(same_AS, index_S, -1).max(1, keepdims=True)
    drafted_A = jnp.where(found_A1[:, 0] >= 0, num_guessed(slots, slot_A, num_guesses), 0)
    step_G = jnp.arange(num_guesses)
    period_A1 = jnp.maximum(length_A1 - 1 - found_A1, 1)
    guess_AG = jnp.take_along_axis(tokens_AS, jnp.minimum(found_A1 + 1 + step_G % period_A1, len(index_S) - 1), 1)
    column_AG = jnp.where(step_G < drafted_A[:, None], length_A1 + step_G, len(index_S))
    tokens = slots.tokens.at[slot_A[:, None], column_AG].set(guess_AG, mode="drop")
    return slots._replace(tokens=tokens, drafted=slots.drafted.at[slot_A].set(drafted_A)), drafted_A


def num_guessed(slots: Slots, slot_A: jax.Array, most_A: jax.Array | int) -> jax.Array:
    """Returns how many tokens may be guessed: no more than `most_A`, none where none are wanted, and one less than there is room for."""
    room_A = slots.limit[slot_A] - slots.length[slot_A] - 1
    return jnp.where(slots.speculates[slot_A], jnp.clip(room_A, 0, most_A), 0)


def counts(tokens_S: jax.Array, num_prompt: jax.Array, length: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns which ids stand in the first `length` tokens, bool [V], and how often each stands in the answer among them, FP32 [V]."""
    index_S = jnp.arange(len(tokens_S))
    add = lambda chosen_S: jnp.zeros(vocab_size).at[tokens_S].add(chosen_S.astype(jnp.float32), mode="drop")
    return add(index_S < length) > 0, add((num_prompt <= index_S) & (index_S < length))
