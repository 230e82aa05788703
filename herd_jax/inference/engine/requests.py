"""What is asked of the engine, and what it answers."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from herd_jax.errors import UserError
from herd_jax.inference.engine.grammar import Grammar
from herd_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how its answers are drawn.

    `prompt`: ids. `num_samples` answers are drawn, numbered from `first_sample` on: an answer depends on the seed and its number. `scores_prompt`:
    the log-probabilities of the prompt's own tokens are wanted; such a prompt is computed whole. `grammar`: what the answers must follow. `salt`: requests of different salts share no
    pages. `speculates`: tokens may be guessed and verified, which changes the speed and not the text.
    """

    prompt: Sequence[int]
    sampling: Sampling = Sampling()
    num_samples: int = 1
    first_sample: int = 0
    scores_prompt: bool = False
    grammar: Grammar | None = None
    salt: str = ""
    speculates: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(map(int, self.prompt)))
        if self.num_samples < 1 or self.first_sample < 0:
            raise UserError(f"num_samples is {self.num_samples} and first_sample {self.first_sample}: give 1 or more, and 0 or more")


class LogProb(NamedTuple):
    """A token's log-probability: raw is the model's own, processed is what it was drawn from: after penalties, bias, grammar, temperature and
    filters. `likeliest`: (id, raw, processed) of the likeliest tokens there, by raw."""

    id: int
    raw: float
    processed: float
    likeliest: tuple[tuple[int, float, float], ...]


class Piece(NamedTuple):
    """What a step adds to an answer. `finish_reason`: None while it goes on; "stop", "length", "abort", or "error": its logits are not numbers."""

    ticket: int
    sample: int
    text: str
    ids: tuple[int, ...]
    log_probs: tuple[LogProb, ...]
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole answer: `text` without what ended it, `ids` with it. `stop`: the string or id that ended it. `num_found`: tokens of the prompt whose
    keys and values were there already. `prompt_log_probs`: of the prompt's tokens after the first, where they were asked for."""

    ticket: int
    request: Request
    sample: int
    text: str
    ids: tuple[int, ...]
    log_probs: tuple[LogProb, ...]
    finish_reason: str
    stop: str | int | None
    num_found: int
    prompt_log_probs: tuple[LogProb, ...]

    def of(self, ticket: int) -> "Answer":
        """Returns the answer with another ticket."""
        return dataclasses.replace(self, ticket=ticket)
