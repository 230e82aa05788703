"""When a row of generated text ends: a stop token, a stop string, or no more room."""

from herd_jax.inference.sampling import Sampling
from herd_jax.text.streaming import StreamingDecoder
from herd_jax.text.tokenizer import Tokenizer


class StopCondition:
    """The text of one row: pushes tokens, holds back what may become a stop string, and knows when the row has ended, and why.

    `reason` is "stop" or "length" once it has ended, and `found` the stop string or the id of the stop token. Without a tokenizer there is no text.
    """

    def __init__(self, tokenizer: Tokenizer | None, sampling: Sampling, room: int):
        self.decoder = StreamingDecoder(tokenizer) if tokenizer else None
        own = tokenizer.stop_ids if tokenizer and not sampling.ignore_eos else ()
        self.stop_ids, self.stop, self.room = {*own, *sampling.stop_ids}, sampling.stop, room
        self.held, self.reason, self.found = "", "length" if room < 1 else None, None

    @property
    def ended(self) -> bool:
        return self.reason is not None

    def push(self, token: int) -> str:
        """Returns the text that the token settles."""
        if self.ended:
            return ""
        self.room -= 1
        if token in self.stop_ids:
            self.reason, self.found = "stop", token
            return ""
        self.held += self.decoder.push(token) if self.decoder else ""
        self.reason = "length" if self.room == 0 else None
        if (cut := self._cut()) is not None:
            return cut
        # A tail that a stop string begins with waits for what follows.
        keep = max((n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text

    def flush(self) -> str:
        """Returns what was held back, when nothing more comes."""
        self.held += self.decoder.flush() if self.decoder else ""
        if (cut := self._cut()) is not None:
            return cut
        text, self.held = self.held, ""
        return text

    def _cut(self) -> str | None:
        """Returns the held text before the first stop string in it, if there is one, and ends the row there."""
        at, stop = min(((self.held.find(text), text) for text in self.stop if text in self.held), default=(-1, ""))
        if at < 0:
            return None
        text, self.held, self.decoder = self.held[:at], "", None
        self.reason, self.found = "stop", stop
        return text
