"""A small tokenizer of each kind, made here, and the texts that are hard for them."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from herd_jax.text.protocol import PROBE
from herd_jax.text.sentencepiece_training import train_sentencepiece
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "def f(x):\n\treturn x  +  1\n\n\n",
    "  leading and trailing  ",
    "a\r\nb\x00c\u2028d\u00a0e\u3000f",
    "▁ is not a space ▁▁",
    "日本語 привет हिन्दी 🙂 e\u0301",
    "<s></s><0x0A><|begin_of_text|><|eot_id|><pad>",
    "",
    " ",
    "\n",
]
KINDS = ("bytes", "llama3", "sentencepiece", "huggingface")

MERGED = [b"th", b"he", b"the", b"in", b" a", b"  ", b"\n\n", b"12", b" zebra"]  # no merges lead to the last
RANKS = [bytes([byte]) for byte in range(256)] + MERGED


def make_all(path: Path) -> dict[str, Tokenizer]:
    path.mkdir(exist_ok=True)
    train_sentencepiece([PROBE, *TEXTS] * 20, 400, path / "sentencepiece.model")
    return {
        "bytes": load_tokenizer("bytes"),
        "llama3": make_llama3(path),
        "sentencepiece": load_tokenizer(path / "sentencepiece.model"),
        "huggingface": make_huggingface(path / "hf"),
    }


def make_llama3(path: Path) -> Tokenizer:
    rank_file = path / "llama3.model"
    rank_file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(RANKS)))
    return load_tokenizer(rank_file)


def make_huggingface(directory: Path, config: dict[str, Any] | None = None) -> Tokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|custom_end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "\n\n\n\n\n\n"] * 5, trainer)
    # This is how released files put a begin token before every text: with bos=True it must not come twice.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": "<|custom_end|>"}, "pad_token": "<|custom_end|>", **(config or {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


def make_llama2_like(path: Path) -> Tokenizer:
    """A SentencePiece model that puts a space before every text."""
    options = {"byte_fallback": True, "vocab_size": 330, "hard_vocab_limit": False, "minloglevel": 2}
    names = {"user_defined_symbols": "[INST],[/INST]", "control_symbols": "<|im_end|>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:5] * 20), model_prefix=str(path / "llama2"), model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False, **options, **names,
    )  # fmt: skip
    return load_tokenizer(path / "llama2.model")


def make_byte_fallback_huggingface(path: Path, legacy: bool) -> Tokenizer:
    """The same model as transformers turns it into a tokenizer.json: a space before every text, `legacy` also behind special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    make_llama2_like(path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path / "llama2.model"))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    splits = [(piece[:k], piece[k:]) for piece in vocabulary for k in range(1, len(piece)) if not piece.startswith(("<", "["))]
    merges = sorted((split for split in splits if {*split} <= vocabulary.keys()), key=lambda split: vocabulary["".join(split)])
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = tokenizers.decoders
    tokenizer.decoder = steps.Sequence([steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


def write_gguf(path: Path, model: str, tokens: Sequence[str], types: Sequence[int], **fields: Any) -> Path:
    """A GGUF file with nothing but a tokenizer; `fields` by their names behind "tokenizer.", a dot written as two underscores."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}.get(type(value), writer.add_array)
        add(f"tokenizer.{name.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
