"""SentencePiece models."""

import itertools
import re
from collections.abc import Mapping

import sentencepiece

from herd_jax.text.protocol import Tokenizer, added_tokens, byte_of_name


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its control pieces are the special tokens. Files beside it may add tokens behind its own."""

    def __init__(self, data: bytes, beside: Mapping[str, bytes]) -> None:
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        special = {processor.id_to_piece(i): i for i in range(processor.vocab_size()) if processor.is_control(i)}
        bos_id, eos_id, pad_id = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id(), processor.pad_id()))
        # SentencePiece writes a space as U+2581, so that character itself would come back as a space: it goes in as bytes,
        # where the model has them and does not put a space before every text.
        space_as_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        is_exact = all(map(processor.is_byte, space_as_bytes)) and "\u2581" not in processor.encode("a", out_type=str)[0]
        self._space_as_bytes = space_as_bytes if is_exact else None
        self._size, added = processor.vocab_size(), added_tokens(beside)
        added = {i: token for i, token in added.items() if i >= self._size}
        special |= {token["content"]: i for i, token in added.items() if token.get("special")}
        self._added = {i: token["content"] for i, token in added.items() if not token.get("special")}
        self._letter = processor.encode("a")[-1:]  # so that what stands behind it keeps its spaces
        names = sorted(self._added.values(), key=len, reverse=True)
        self._added_pattern = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        super().__init__(max([self._size - 1, *added]) + 1, special, bos_id, eos_id, pad_id, {"tokenizer.model": data, **beside})

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= self._size:
            return self._added.get(token_id, "").encode()
        if self._processor.is_control(token_id):
            return b""
        piece = self._processor.id_to_piece(token_id)
        return byte_of_name(piece) if self._processor.is_byte(token_id) else piece.replace("\u2581", " ").encode()

    def _encode_text(self, text: str) -> list[int]:
        first, *rest = self._added_pattern.split(text) if self._added_pattern else [text]
        ids, id_of = self._encode_pieces(first), {name: i for i, name in self._added.items()}
        for i, part in enumerate(rest):
            ids += self.encode_continuation(part) if i % 2 else [id_of[part]]
        return ids

    def _encode_pieces(self, text: str) -> list[int]:
        if self._space_as_bytes is None or "\u2581" not in text:
            return self._processor.encode(text)
        first, *rest = (self._processor.encode(part) for part in text.split("\u2581"))
        return [*first, *itertools.chain.from_iterable((*self._space_as_bytes, *part) for part in rest)]

    def _decode_ids(self, ids: list[int]) -> str:
        special = set(self.special_ids.values())  # not left to SentencePiece: they would cut a character in two
        runs = itertools.groupby((i for i in ids if i not in special and (i < self._size or i in self._added)), self._added.__contains__)
        first, *rest = [(is_added, list(run)) for is_added, run in runs] or [(False, [])]
        text = "".join(map(self._added.get, first[1])) if first[0] else self._processor.decode(first[1])
        for is_added, run in rest:
            text += "".join(map(self._added.get, run)) if is_added else self._processor.decode([*self._letter, *run])[1:]
        return text
