"""The choice of the next token from logits."""

import dataclasses
import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from herd_jax.errors import UserError

GREEDY_BELOW = 1e-5  # temperatures: a difference of logits, divided by less, is nothing or everything
NOT_FINITE = -1  # in place of a token


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn, checked: raises UserError in one sentence for what is not of the right type, or out of range.

    `temperature` 0 takes the likeliest token. `top_p` draws from the fewest tokens that together have that probability or more. `seed` is from
    0 to 2^64 - 1. `stop` are strings that end an answer.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.max_new_tokens, "max_new_tokens", numbers.Integral, "a whole number, 1 or more", lambda n: n >= 1)
        _check(self.temperature, "temperature", numbers.Real, "a number, 0 or more", lambda t: 0 <= t < float("inf"))
        _check(self.top_p, "top_p", numbers.Real, "a number in (0, 1]", lambda p: 0 < p <= 1)
        _check(self.seed, "seed", numbers.Integral, "a whole number from 0 to 2^64 - 1", lambda seed: 0 <= seed < 2**64)
        object.__setattr__(self, "stop", tuple(several(self.stop, "stop")))
        if "" in self.stop:
            raise UserError("stop has an empty string in it, with which every answer would end at once: leave it out")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def choose(self, logits_BV: jax.Array, step: int, num_ids: int) -> jax.Array:
        """Returns the next token of each row, one of the first `num_ids`, or NOT_FINITE: int32 [B]."""
        folded = np.uint32(int(self.seed) % 2**32) ^ np.uint32(int(self.seed) >> 32)
        temperature, top_p = float(self.temperature), float(self.top_p)
        return choose(logits_BV, folded, step, temperature, top_p, greedy=self.greedy, nucleus=top_p < 1, num_ids=num_ids)


def several(texts: Any, name: str) -> list[str]:
    """Returns the texts. Raises UserError for one string where a sequence of them is meant, since its letters would pass for texts, and for
    what is not text."""
    listed = None if isinstance(texts, str) or not hasattr(texts, "__iter__") else list(texts)
    if listed is None or not all(isinstance(text, str) for text in listed):
        raise UserError(f"{name} must be a list of strings: put a single one into a list")
    for text in listed:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name} has {text!r:.80} in it, which is no text in UTF-8: correct or drop it") from error
    return listed


def _check(value: Any, name: str, kind: type, what: str, holds) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not holds(value):
        raise UserError(f"{name} is {value!r:.80}: it must be {what}")


@functools.partial(jax.jit, static_argnames=("greedy", "nucleus", "num_ids"))
def choose(
    logits_BV: jax.Array, seed: jax.Array, step: jax.Array, temperature: jax.Array, top_p: jax.Array, *, greedy: bool, nucleus: bool,
    num_ids: int | None = None,
) -> jax.Array:  # fmt: skip
    """Returns int32 [B]: the likeliest token where `greedy`; else one drawn at `temperature`, where `nucleus` from the fewest tokens that
    together have probability `top_p` or more. A row's draw depends on the seed, the step and the row's number alone. Tokens from `num_ids` on
    are never chosen (those that a tokenizer has no text for); NOT_FINITE stands for a row whose logits are not numbers."""
    V = logits_BV.shape[-1]
    if num_ids is not None and num_ids < V:
        logits_BV = jnp.where(jnp.arange(V) < num_ids, logits_BV, -jnp.inf)
    most_B1 = logits_BV.max(axis=-1, keepdims=True)
    if greedy:
        # The same as jnp.argmax, which is five times slower on CPU.
        chosen_B = jnp.where(logits_BV == most_B1, jnp.arange(V, dtype=jnp.int32), V - 1).min(axis=-1)
    else:
        chosen_B = _draw((logits_BV - most_B1) / temperature, seed, step, top_p, nucleus)
    return jnp.where(jnp.isfinite(most_B1[:, 0]), chosen_B, NOT_FINITE)


def _draw(logits_BV, seed, step, top_p, nucleus: bool):
    if nucleus:
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
        keep_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV < top_p  # the likelier ones together do not reach top_p
        back_BV = jnp.argsort(order_BV, axis=-1)
        logits_BV = jnp.where(jnp.take_along_axis(keep_BV, back_BV, axis=-1), logits_BV, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits_BV)))
    return jax.vmap(jax.random.categorical)(keys, logits_BV).astype(jnp.int32)
