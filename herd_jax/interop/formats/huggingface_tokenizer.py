"""A tokenizer as transformers loads it: its own files where it comes from there, else a tokenizer.json of the same ids."""

import base64
import json
from pathlib import Path
from typing import Any

from herd_jax.errors import UserError
from herd_jax.text.llama3_tokenizer import SPLIT_PATTERN, Llama3Tokenizer
from herd_jax.text.protocol import CONFIG_FILE
from herd_jax.text.sentencepiece_tokenizer import SentencePieceTokenizer
from herd_jax.text.tokenizer import ByteTokenizer, Tokenizer

SPACE = "\u2581"  # SentencePiece's
# The format of messages that hold text alone, as the model card of Llama 3 gives it.
LLAMA3_CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def write_tokenizer(directory: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Writes the tokenizer's files. Raises UserError for a kind of SentencePiece model that this cannot turn into a tokenizer.json."""
    tokenizer.save(directory)
    made = None
    if isinstance(tokenizer, Llama3Tokenizer):
        lines = map(bytes.split, (directory / "tokenizer.model").read_bytes().splitlines())
        made = _byte_level(tokenizer, {base64.b64decode(token): int(rank) for token, rank in lines}, SPLIT_PATTERN)
    elif isinstance(tokenizer, ByteTokenizer):
        made = _byte_level(tokenizer, {bytes([i]): i for i in range(256)}, r"[\s\S]+")
    elif isinstance(tokenizer, SentencePieceTokenizer):
        made = _sentencepiece(tokenizer, (directory / "tokenizer.model").read_bytes())
    if made is not None:
        _write_json(directory / "tokenizer.json", made)
    if not (directory / CONFIG_FILE).exists():
        _write_json(directory / CONFIG_FILE, _config(tokenizer, context_length))


def _config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    name_of = {i: name for name, i in tokenizer.special_ids.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    has_dialogs = isinstance(tokenizer, Llama3Tokenizer) and tokenizer.chat_template is None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{field: name_of[i] for field, i in ids.items() if i in name_of},
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **({"chat_template": LLAMA3_CHAT_TEMPLATE} if has_dialogs else {}),
    }


def _byte_level(tokenizer: Tokenizer, tokens: dict[bytes, int], pattern: str) -> dict[str, Any]:
    """Returns a tokenizer.json of a byte-level BPE, which merges the pair whose whole has the lowest id."""
    letters = _byte_letters()
    vocabulary = {"".join(letters[byte] for byte in token): i for token, i in tokens.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _tokenizer_json(
        tokenizer,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
        decoder=byte_level,
        model={"ignore_merges": True, "vocab": vocabulary, "merges": _merges(vocabulary, sorted(vocabulary, key=vocabulary.get))},
    )


def _sentencepiece(tokenizer: Tokenizer, data: bytes) -> dict[str, Any]:
    """Returns a tokenizer.json of a BPE over characters, where spaces are U+2581 and unknown characters their bytes."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    proto = ModelProto.FromString(data)
    normalizer, kinds = proto.normalizer_spec, ModelProto.SentencePiece
    if proto.trainer_spec.model_type != TrainerSpec.BPE or normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError(
            "the SentencePiece model is not a BPE that leaves text as it is, and only those become a tokenizer.json here: "
            "put the tokenizer.json of the model beside it"
        )
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = [piece for piece in proto.pieces if piece.type == kinds.NORMAL]
    unknown = next((piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN), None)
    prefix = normalizer.add_dummy_prefix
    replace = lambda old, new: {"type": "Replace", "pattern": {"String": old}, "content": new}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return _tokenizer_json(
        tokenizer,
        normalizer={"type": "Sequence", "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), replace(" ", SPACE)]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        model={
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "vocab": vocabulary,
            "merges": _merges(vocabulary, [piece.piece for piece in sorted(normal, key=lambda piece: -piece.score)]),
        },
    )


def _tokenizer_json(tokenizer: Tokenizer, normalizer, pre_tokenizer, decoder, model: dict[str, Any]) -> dict[str, Any]:
    begin = {name: i for name, i in tokenizer.special_ids.items() if i == tokenizer.bos_id}
    first = [{"SpecialToken": {"id": name, "type_id": 0}} for name in begin]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted(tokenizer.special_ids.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in special],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in begin.items()},
        },
        "decoder": decoder,
        "model": {"type": "BPE", **model},
    }


def _merges(vocabulary: dict[str, int], tokens: list[str]) -> list[list[str]]:
    """Returns every pair of tokens that makes up one of `tokens`, in the order of `tokens`: earlier pairs are merged first."""
    halves = ((token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token)))
    return [[left, right] for left, right in halves if left in vocabulary and right in vocabulary]


def _byte_letters() -> list[str]:
    """Returns the letter that stands for each byte: itself where it prints, else one from 256 on, in order (as in GPT-2)."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
