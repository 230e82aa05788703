"""Hugging Face `tokenizer.json` files."""

import json
import re
from collections.abc import Mapping, Sequence

from herd_jax.errors import UserError
from herd_jax.text.protocol import EOS_NAMES, PROBE, STOP_NAMES, Tokenizer, added_tokens, byte_of_name, import_extra, read_config, special_names

# What begin and padding tokens are commonly called, where no tokenizer_config.json beside the file says so.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]")

# How byte-level tokens write their bytes: those that print as they are, the others, in order, from U+0100 on.
PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTING} | {chr(0x100 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*PRINTING}))}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; the files that lie beside name the begin, end and padding tokens, and may add tokens. How texts were cut or filled up
    when the file was saved, and the chance with which it dropped merges, are left out: they are not part of the tokenizer."""

    def __init__(self, data: bytes, beside: Mapping[str, bytes]) -> None:
        tokenizers = import_extra("tokenizers", "a tokenizer.json")
        data = _without_state(data)
        self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        self._add(tokenizers.AddedToken, added_tokens(beside))
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        config, named = read_config(beside), special_names(beside)

        def name_of(field: str, usual_names: Sequence[str]) -> str | None:
            return next((name for name in ([named[field]] if named.get(field) else usual_names) if name in vocabulary), None)

        bos, eos, pad = name_of("bos_token", BOS_NAMES), name_of("eos_token", EOS_NAMES), name_of("pad_token", PAD_NAMES)
        added = self._tokenizer.get_added_tokens_decoder()
        # Some files forget to call them special.
        forgotten = [name for name in (bos, eos, pad, *STOP_NAMES) if name in vocabulary and not _is_special(added, vocabulary[name])]
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in forgotten])
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are plain text
        special = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        steps = {key: json.dumps(value) for key, value in json.loads(data).items() if key in ("normalizer", "pre_tokenizer", "decoder")}
        self.adds_space_once = '"prepend_scheme": "first"' in steps.get("pre_tokenizer", "")
        if '"ByteFallback"' in steps.get("decoder", ""):
            self.byte_fallback_ids = frozenset(i for name, i in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", name))
        files = {"tokenizer.json": data, **beside}
        super().__init__(max(vocabulary.values()) + 1, special, *(vocabulary.get(name) for name in (bos, eos, pad)), files)
        self._added = frozenset(added)
        self._is_byte_level = '"ByteLevel"' in steps.get("decoder", "")  # each character of a token's name is a byte
        keeps_spaces = not any(token.lstrip or token.rstrip for token in added.values()) and steps.get("normalizer", "null") == "null"
        self.is_lossless = self._is_byte_level and keeps_spaces and sum(map(self.num_bytes, self.encode(PROBE))) == len(PROBE.encode())
        self.adds_bos = self._tokenizer.encode("a").ids[:1] == [self.bos_id] or config.get("add_bos_token") is True

    def _add(self, added_token: type, tokens: Mapping[int, dict]) -> None:
        """Adds the tokens that the file itself has not. Raises UserError where they do not get the ids that they are listed with."""
        for token_id, token in tokens.items():
            own = self._tokenizer.get_added_tokens_decoder().get(token_id)
            if own is None or own.content != token["content"]:
                flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in token}
                self._tokenizer.add_tokens([added_token(token["content"], **flags)])
                if (got := self._tokenizer.token_to_id(token["content"])) != token_id:
                    raise UserError(
                        f"the added token {token['content']} is listed with the id {token_id} beside a tokenizer.json in which it gets {got}: "
                        "they do not belong together, so copy the tokenizer's files again"
                    )

    def token_bytes(self, token_id: int) -> bytes:
        name = self._tokenizer.id_to_token(token_id)
        if name is None or name in self.special_ids:
            return b""
        if self._is_byte_level and token_id not in self._added:
            return bytes(BYTE_OF_CHARACTER.get(character, ord("?")) for character in name)
        return byte_of_name(name) if token_id in self.byte_fallback_ids else name.replace("\u2581", " ").encode()

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode_ids(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _without_state(data: bytes) -> bytes:
    """Returns a tokenizer.json that neither cuts texts nor fills them up nor drops merges at random."""
    content = json.loads(data)
    dropout = isinstance(content.get("model"), dict) and content["model"].get("dropout")
    if not (content.get("truncation") or content.get("padding") or dropout):
        return data
    content |= {"truncation": None, "padding": None, "model": content["model"] | {"dropout": None}}
    return json.dumps(content, ensure_ascii=False).encode()


def _is_special(added: Mapping, token_id: int) -> bool:
    return token_id in added and added[token_id].special
