"""An answer as it grows: its text, its end, and what is told of it."""

import numpy as np

from herd_jax.inference.draw import NOT_FINITE
from herd_jax.inference.engine.grammar import Guide
from herd_jax.inference.engine.programs import Drawn
from herd_jax.inference.engine.requests import Answer, LogProb, Piece, Request
from herd_jax.inference.engine.scheduler import Sample
from herd_jax.inference.stopping import StopCondition


class Progress:
    """The answer to sample `number` of a request, so far. `reason` says why it has ended, once it has."""

    def __init__(self, ticket: int, number: int, request: Request, stop: StopCondition, guide: Guide | None) -> None:
        self.ticket, self.number, self.request, self.stop, self.guide = ticket, number, request, stop, guide
        self.reason: str | None = None
        self._text: list[str] = []
        self._ids: list[int] = []
        self._log_probs: list[LogProb] = []
        self._prompt_log_probs: list[LogProb] = []

    def push(self, drawn: Drawn, row: int, ids: list[int]) -> Piece:
        """Takes the tokens that were drawn in a row; returns what they add."""
        texts, used = [], 0
        for token in ids if not self.stop.ended else ():  # behind a prompt that fills the context nothing is drawn
            if token == NOT_FINITE:
                self.reason = "error"
                break
            texts.append(self.stop.push(token))
            used += 1
            if self.guide:
                self.guide.take(token)
            if self.stop.ended or (self.guide and self.guide.has_ended):
                break
        if self.stop.ended or (self.guide and self.guide.has_ended):
            self.reason = self.reason or self.stop.reason or "stop"
        if self.reason:
            texts.append(self.stop.flush())
        log_probs = self._read(drawn, row, drawn.ids, used) if self.request.sampling.log_probs is not None else []
        self._text += texts
        self._ids += ids[:used]
        self._log_probs += log_probs
        return Piece(self.ticket, self.number, "".join(texts), tuple(ids[:used]), tuple(log_probs), self.reason)

    def push_scores(self, scores: Drawn, row: int, count: int) -> None:
        """Takes the log-probabilities of the prompt's next `count` tokens."""
        self._prompt_log_probs += self._read(scores, row, scores.ids, count)

    def answer(self, sample: Sample) -> Answer:
        """Returns the answer, which has ended."""
        return Answer(
            self.ticket, self.request, self.number, "".join(self._text), tuple(self._ids), tuple(self._log_probs), self.reason, self.stop.found,
            sample.num_found, tuple(self._prompt_log_probs[: len(self.request.prompt) - 1]),
        )  # fmt: skip

    def _read(self, drawn: Drawn, row: int, ids, count: int) -> list[LogProb]:
        number = self.request.sampling.log_probs or 0
        tokens, log_p, likeliest = np.asarray(ids)[row], np.asarray(drawn.log_p)[row], np.asarray(drawn.likeliest)[row]
        size, found = likeliest.shape[-1], []
        for at in range(count):
            raw, processed = log_p[at, 2 : 2 + size].tolist(), log_p[at, 2 + size :].tolist()
            top = tuple(zip(likeliest[at].tolist(), raw, processed))[:number]
            found.append(LogProb(int(tokens[at]), float(log_p[at, 0]), float(log_p[at, 1]), top))
        return found
