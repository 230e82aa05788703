"""The tokenizer inside a GGUF file, turned into the kind it was made from: a byte-level BPE into `tokenizer.json`, a SentencePiece model
into `tokenizer.model`. Its chat template and its begin, end, padding and stop tokens go into the files that Hugging Face puts beside.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from herd_jax.errors import UserError
from herd_jax.text.huggingface_tokenizer import HuggingFaceTokenizer
from herd_jax.text.llama3_tokenizer import SPLIT_PATTERN
from herd_jax.text.protocol import CONFIG_FILE, GENERATION_FILE, TEMPLATE_FILE, Tokenizer, import_extra
from herd_jax.text.sentencepiece_tokenizer import SentencePieceTokenizer

GGUF_MAGIC = b"GGUF"
LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("gpt-2", "smollm", *LLAMA3_PRE)
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # types of tokens; GGUF has them from SentencePiece


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """Reads the tokenizer of a file. Raises UserError where the file has no tokenizer, or one of a kind or with a splitting of text that is
    not known here."""
    fields = import_extra("gguf", "a GGUF file", "gguf").GGUFReader(path).fields
    prefix = "tokenizer.ggml."
    metadata = {name.removeprefix(prefix): field.contents() for name, field in fields.items() if name.startswith(prefix)}
    template = fields.get("tokenizer.chat_template")
    model = metadata.get("model")
    if model is None:
        raise UserError(f"{path} has no tokenizer inside: name another tokenizer")
    beside = _files_beside(metadata, template and template.contents())
    if model == "llama":
        return SentencePieceTokenizer(_sentencepiece_model(metadata), beside)
    if model != "gpt2":
        raise UserError(f"{path} has a tokenizer of kind '{model}' and only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece) are read")
    if metadata.get("pre") not in PRE_TOKENIZERS:
        raise UserError(
            f"{path} splits text in the way '{metadata.get('pre')}' before its BPE and only {', '.join(PRE_TOKENIZERS)} are known: "
            "take the tokenizer.json of the original model"
        )
    return HuggingFaceTokenizer(_tokenizer_json(metadata, import_extra("tokenizers", "a GGUF file")), beside)


def _files_beside(metadata: Mapping[str, Any], template: str | None) -> dict[str, bytes]:
    fields = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id", "unk_token": "unknown_token_id"}
    config = {field: metadata["tokens"][metadata[key]] for field, key in fields.items() if key in metadata}
    # So that transformers opens the saved directory, too: it has no class of its own for a tokenizer.json without a model's config.
    files = {CONFIG_FILE: json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}).encode()}
    stops = [metadata[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in metadata]
    if stops:
        files[GENERATION_FILE] = json.dumps({"eos_token_id": stops}).encode()
    if template:
        files[TEMPLATE_FILE] = template.encode()
    return files


def _tokenizer_json(metadata: Mapping[str, Any], tokenizers: ModuleType) -> bytes:
    """Returns the `tokenizer.json` of a byte-level BPE."""
    tokens, types, pre = metadata["tokens"], metadata["token_type"], metadata["pre"]
    merges = [tuple(merge.split(" ")) for merge in metadata["merges"]]
    # Llama 3 takes a whole word that is a token as it is, even where no merges lead to it.
    bpe = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre in LLAMA3_PRE)
    tokenizer = tokenizers.Tokenizer(bpe)
    splits = tokenizers.pre_tokenizers
    if pre in LLAMA3_PRE:
        words = splits.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
        tokenizer.pre_tokenizer = splits.Sequence([words, splits.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        digits = [splits.Digits(individual_digits=True)] if pre == "smollm" else []
        tokenizer.pre_tokenizer = splits.Sequence([*digits, splits.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    added = [
        tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if metadata.get("add_bos_token", pre in LLAMA3_PRE):
        bos_id = metadata["bos_token_id"]
        begin = tokenizers.processors.TemplateProcessing(single=[tokens[bos_id], "$A"], special_tokens=[(tokens[bos_id], bos_id)])
        tokenizer.post_processor = begin
    return tokenizer.to_str().encode()


def _sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """Returns the SentencePiece model, from its pieces, their scores and types."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    model = ModelProto()
    for token, score, kind in zip(metadata["tokens"], metadata["scores"], metadata["token_type"], strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    spec = model.trainer_spec
    spec.model_type = TrainerSpec.BPE
    spec.vocab_size = len(model.pieces)
    spec.byte_fallback = BYTE in metadata["token_type"]
    spec.unk_piece = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    spec.bos_piece, spec.eos_piece, spec.pad_piece = (
        metadata["tokens"][metadata[key]] if key in metadata else ""
        for key in ("bos_token_id", "eos_token_id", "padding_token_id")
    )
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = metadata.get("add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = metadata.get("remove_extra_whitespaces", False)
    return model.SerializeToString()
