"""The tokenizer of Llama 3 (section 3.2): a tiktoken rank file."""

import base64
import itertools
import re
from collections.abc import Iterator, Mapping

from herd_jax.text.protocol import Tokenizer, import_extra

# The released tokenizer: its split pattern and its first special tokens; the rest of the 256 are reserved.
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUM_SPECIAL = 256
NAMED_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
MAX_CHARS = 400_000  # tiktoken overflows its stack on longer texts,
MAX_RUN = 25_000  # and is quadratic in runs without a change between whitespace and the rest


class Llama3Tokenizer(Tokenizer):
    """A tiktoken rank file in the Llama 3 layout: the ranks, then 256 special tokens (ids from 128,000 in the released file)."""

    is_lossless = True

    def __init__(self, data: bytes, beside: Mapping[str, bytes]) -> None:
        tiktoken = import_extra("tiktoken", "a Llama 3 tokenizer.model")
        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        reserved = (f"<|reserved_special_token_{2 + i}|>" for i in range(NUM_SPECIAL - len(NAMED_SPECIAL)))
        special = {name: len(ranks) + i for i, name in enumerate((*NAMED_SPECIAL, *reserved))}
        self._encoding = tiktoken.Encoding(name="llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self._num_ranks = len(ranks)
        super().__init__(
            len(ranks) + NUM_SPECIAL,
            special,
            bos_id=special["<|begin_of_text|>"],
            eos_id=special["<|end_of_text|>"],
            pad_id=special["<|finetune_right_pad_id|>"],
            files={"tokenizer.model": data, **beside},
        )

    def token_bytes(self, token_id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token_id) if token_id < self._num_ranks else b""

    def _encode_text(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self._encoding.encode_ordinary, _chunks(text))))

    def _decode_ids(self, ids: list[int]) -> str:
        return self._encoding.decode([i for i in ids if i < self._num_ranks])


def _chunks(text: str) -> Iterator[str]:
    """Cuts `text` where the released tokenizer cuts it: every 400,000 characters, and inside too long runs."""
    long_run = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1},}}|(?<!\s)\s{{{MAX_RUN + 1},}}")
    for offset in range(0, len(text), MAX_CHARS):
        chunk = text[offset : offset + MAX_CHARS]
        cuts = [cut for run in long_run.finditer(chunk) for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
        for start, stop in itertools.pairwise([0, *cuts, len(chunk)]):
            yield chunk[start:stop]
