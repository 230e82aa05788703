"""When a row of generated text ends: a stop token, a stop string, or no more room."""

from collections.abc import Sequence

from herd_jax.text.streaming import StreamingDecoder
from herd_jax.text.tokenizer import Tokenizer


class StopCondition:
    """The text of one row: pushes tokens, holds back what may become a stop string, and knows when the row has ended, and whether it `was_cut`
    because there was no more room."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], room: int):
        self.decoder, self.stop_ids, self.stop, self.room = StreamingDecoder(tokenizer), set(tokenizer.stop_ids), stop, room
        self.held, self.ended, self.was_cut = "", room < 1, room < 1

    def push(self, token: int) -> str:
        if self.ended:
            return ""
        self.room -= 1
        if token in self.stop_ids:
            self.ended = True
            return ""
        self.held += self.decoder.push(token)
        self.ended = self.was_cut = self.room == 0
        found = min((self.held.find(text) for text in self.stop if text in self.held), default=-1)
        if found >= 0:
            text, self.held, self.ended, self.was_cut, self.decoder = self.held[:found], "", True, False, None
            return text
        # A tail that a stop string begins with waits for what follows.
        keep = max((n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text

    def flush(self) -> str:
        """Returns what was held back, when nothing more comes."""
        if self.decoder is None:
            return ""
        text = self.held + self.decoder.flush()
        found = min((text.find(stop) for stop in self.stop if stop in text), default=len(text))
        return text[:found]
