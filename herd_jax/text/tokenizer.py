"""Tokenizers behind one protocol: Llama 3 (tiktoken), SentencePiece, Hugging Face `tokenizer.json`, GGUF, bytes.

`load_tokenizer` finds out by looking which one a file holds. Training one is not here (`sentencepiece_training.py`), nor is
the dialog format (`chat.py`).
Special tokens typed by a user stay text unless `allow_special`; a beginning-of-text token is never doubled;
`decode` leaves special tokens out; `save` writes what `load_tokenizer` needs to read the same tokenizer back.
"""

import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from herd_jax.errors import UserError
from herd_jax.files import refuse_pointer, user_path
from herd_jax.text.gguf_tokenizer import GGUF_MAGIC, read_gguf_tokenizer
from herd_jax.text.huggingface_tokenizer import HuggingFaceTokenizer
from herd_jax.text.llama3_tokenizer import Llama3Tokenizer
from herd_jax.text.protocol import BESIDE_FILES, GENERATION_FILE, SPECIAL_ID_FIELDS, Tokenizer, read_config
from herd_jax.text.sentencepiece_tokenizer import SentencePieceTokenizer

__all__ = ["ByteTokenizer", "Tokenizer", "load_tokenizer"]

RANK_LINE = rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n"  # of a tiktoken file
BYTES_FILE = b"bytes\n"  # the whole of what a saved byte tokenizer consists of


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, then begin, end and padding."""

    is_lossless = True

    def __init__(self, beside: Mapping[str, bytes]) -> None:
        special_ids = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257, "<|pad|>": 258}
        super().__init__(259, special_ids, 256, 257, 258, {"tokenizer.bytes": BYTES_FILE, **beside})

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def _encode_text(self, text: str) -> list[int]:
        return list(text.encode())

    def _decode_ids(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Loads the tokenizer `"bytes"`, or that of a file or directory, recognised by its content.

    Raises UserError where there is none, where the file is damaged or of another kind, or where its library is not installed.
    """
    if str(name_or_path) == "bytes":
        return ByteTokenizer({})
    path = _tokenizer_file(user_path(name_or_path))
    refuse_pointer(path)
    try:
        return _read(path, _files_beside(path))
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception or RuntimeError on a file that they cannot read
        reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder="...")
        raise UserError(
            f"{path} cannot be read as {_kind(path)} ({reason}): it or a file beside it is damaged, or made for a newer version of the library "
            "that reads it, so copy it again, upgrade that library, or name another tokenizer"
        ) from error


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(512)
    kinds = {GGUF_MAGIC: "a GGUF file", b"{": "a Hugging Face tokenizer.json"}
    found = next((kind for sign, kind in kinds.items() if start.lstrip().startswith(sign)), None)
    return found or ("a tiktoken rank file" if re.match(RANK_LINE, start) else "a SentencePiece model")


def _read(path: Path, beside: Mapping[str, bytes]) -> Tokenizer:
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:  # which may hold a whole model, and says all about its tokenizer itself
            return read_gguf_tokenizer(path)
    data = path.read_bytes()
    if data == BYTES_FILE:
        return ByteTokenizer(beside)
    if re.match(RANK_LINE, data):
        return Llama3Tokenizer(data, beside)
    if data.lstrip()[:1] == b"{":
        return HuggingFaceTokenizer(data, beside)
    return SentencePieceTokenizer(data, beside)


def _files_beside(path: Path) -> dict[str, bytes]:
    """Returns the files that say more about a tokenizer. The special ids that only the model's config.json has are among them."""
    files = {name: path.with_name(name).read_bytes() for name in BESIDE_FILES if path.with_name(name).is_file()}
    if (config := path.with_name("config.json")).is_file():
        generation = read_config(files, GENERATION_FILE)
        of_model = json.loads(config.read_bytes())
        missing = {name: of_model[name] for name in SPECIAL_ID_FIELDS if generation.get(name) is None and of_model.get(name) is not None}
        if missing:
            files[GENERATION_FILE] = json.dumps(generation | missing, indent=2).encode()
    return files


def _tokenizer_file(path: Path) -> Path:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer.bytes")
    candidates = [path / name for name in names] if path.is_dir() else [path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        missing = f"holds none of {', '.join(names)}" if path.is_dir() else "does not exist"
        raise UserError(f'tokenizer {path} {missing}: name "bytes", a tokenizer file or a directory that holds one')
    return found
