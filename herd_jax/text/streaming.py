"""Text of token ids as they come, never to be taken back."""

from herd_jax.text.tokenizer import Tokenizer

MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes


class StreamingDecoder:
    """Turns one sequence of ids into text piece by piece: the pieces together are `tokenizer.decode` of all ids.

    No piece ends within a UTF-8 character or can be changed by a later token: text that could be is held back. Linear in the number
    of tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_ids.values())
        # The first token of a text may lose its space. Whatever follows it is decoded behind these ids instead of all that went before.
        self._anchor: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Returns the text that `token_id` completes, possibly empty. Special tokens have none."""
        if token_id in self._special:
            return ""
        self._held.append(token_id)
        return self.flush() if self._is_settled(token_id) else ""

    def flush(self) -> str:
        """Returns the text held back, where no further token comes; bytes of an unfinished character become replacement characters."""
        text = self._decode(self._held)
        if text:
            self._anchor = self._tokenizer.encode("a")
        if text or self._anchor:  # else it was a space at the beginning, and what follows it has to be decoded with it
            self._held = []
        return text

    def _is_settled(self, last_id: int) -> bool:
        if last_id in self._tokenizer.byte_fallback_ids:
            return False
        if "\ufffd" not in self._decode([last_id]):
            return True  # whole characters, which end whatever was unfinished before them
        return 1 < len(self._held) <= MAX_CHARACTER_TOKENS and "\ufffd" not in self._decode(self._held)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([*self._anchor, *ids])[len(self._tokenizer.decode(self._anchor)) :]
