"""How the tokens of an answer are chosen: the options of a request, checked."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from herd_jax.errors import UserError
from herd_jax.inference.draw import Options

MAX_BIASES = 1024  # tokens of one request whose logits may be biased
MAX_LOG_PROBS = 20  # likeliest tokens whose log-probabilities can be asked for, as OpenAI's and vLLM's


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; raises UserError in one sentence for what is not of the right type, or out of range.

    `temperature` 0 takes the likeliest token. The filters follow it in this order: `top_k` keeps the k likeliest tokens (0: all), `top_p` the
    fewest that together have that probability or more, `min_p` those with at least that share of the likeliest one's probability.
    Before it come `repetition_penalty` (divides positive logits of tokens in prompt or answer, multiplies negative ones), `presence_penalty` and
    `frequency_penalty` (taken off the logits of tokens in the answer, once, or each time) and `logit_bias` (added, by token id).
    `seed` is from 0 to 2^64 - 1. `stop` are strings, `stop_ids` tokens that end an answer beside the tokenizer's own; `ignore_eos` leaves out those.
    `log_probs`: how many of the likeliest tokens are given with each token's log-probability; None gives none at all.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    log_probs: int | None = None

    def __post_init__(self) -> None:
        finite = lambda value: abs(value) < float("inf")
        _check(self.max_new_tokens, "max_new_tokens", numbers.Integral, "a whole number, 1 or more", lambda n: n >= 1)
        _check(self.temperature, "temperature", numbers.Real, "a number, 0 or more", lambda t: 0 <= t < float("inf"))
        _check(self.top_p, "top_p", numbers.Real, "a number in (0, 1]", lambda p: 0 < p <= 1)
        _check(self.seed, "seed", numbers.Integral, "a whole number from 0 to 2^64 - 1", lambda seed: 0 <= seed < 2**64)
        _check(self.top_k, "top_k", numbers.Integral, "a whole number, 0 (all tokens) or more", lambda k: 0 <= k < 2**31)
        _check(self.min_p, "min_p", numbers.Real, "a number from 0 to 1", lambda p: 0 <= p <= 1)
        _check(self.repetition_penalty, "repetition_penalty", numbers.Real, "a number above 0", lambda p: p > 0 and finite(p))
        _check(self.presence_penalty, "presence_penalty", numbers.Real, "a number from -2 to 2", lambda p: -2 <= p <= 2)
        _check(self.frequency_penalty, "frequency_penalty", numbers.Real, "a number from -2 to 2", lambda p: -2 <= p <= 2)
        if self.log_probs is not None:
            most = MAX_LOG_PROBS
            _check(self.log_probs, "log_probs", numbers.Integral, f"a whole number from 0 to {most}, or None", lambda n: 0 <= n <= most)
        object.__setattr__(self, "stop", tuple(several(self.stop, "stop")))
        if "" in self.stop:
            raise UserError("stop has an empty string in it, with which every answer would end at once: leave it out")
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        for token in self.stop_ids:
            _check(token, "a token of stop_ids", numbers.Integral, "a whole number, 0 or more", lambda i: i >= 0)
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_BIASES:
            raise UserError(f"logit_bias must give numbers by token id, for {MAX_BIASES} tokens at most: leave out those that matter least")
        for token, bias in self.logit_bias.items():
            _check(token, "a token of logit_bias", numbers.Integral, "a whole number, 0 or more", lambda i: i >= 0)
            _check(bias, f"the logit_bias of token {token}", numbers.Real, "a number from -100 to 100", lambda b: -100 <= b <= 100)

    def options(self, rows: int = 1, sample: int = 0) -> Options:
        """Returns the options of `rows` rows that are drawn alike, as arrays [rows]."""
        seed = np.array([int(self.seed) >> 32, int(self.seed) % 2**32], np.uint32)
        values = (seed, np.int32(sample), np.float32(self.temperature), np.int32(self.top_k), np.float32(self.top_p), np.float32(self.min_p))
        return Options(*(np.broadcast_to(value, (rows, *value.shape)) for value in values))


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
