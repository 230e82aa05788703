"""What every tokenizer does, whatever its file format."""

import abc
import functools
import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from herd_jax.errors import UserError

# Files of a Hugging Face directory that say more about the tokenizer beside them, of whatever kind it is.
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
SPECIAL_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a generation_config.json
ADDED_FILE = "added_tokens.json"
SPECIAL_FILE = "special_tokens_map.json"
BESIDE_FILES = (CONFIG_FILE, TEMPLATE_FILE, GENERATION_FILE, ADDED_FILE, SPECIAL_FILE)

# What tokens that end a text are commonly called, and those that end a message.
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")
STOP_NAMES = (*EOS_NAMES, "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>")

# Text whose ids tell tokenizers apart.
PROBE = "The naïve 1234567 cats'll  run:\n\n\tif (x_i >= 0.5) { return '<s>' }\r\n\r\n    第三章 привет हिन्दी 🙂 disestablished"


class Tokenizer(abc.ABC):
    """Turns text into token ids and back.

    `special_ids` maps the text of each special token to its id. `bos_id`, `eos_id` and `pad_id` are None where there is none
    (a padding token equal to the end token counts as none: it would hide the real end). `stop_ids` end a generated answer.
    `chat_template` is the Jinja template of the model's dialogs, None where it has none. `byte_fallback_ids` are tokens of one byte
    whose text depends on all such tokens beside them.
    """

    byte_fallback_ids: frozenset[int] = frozenset()
    is_lossless: bool = False  # whether it is known that a text's tokens have all of its bytes
    adds_bos: bool = True  # whether the model's texts begin with `bos_id`, if there is one
    adds_space_once: bool = False  # of those that put a space before a text: not again behind special tokens

    def __init__(
        self,
        vocab_size: int,
        special_ids: dict[str, int],
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
        files: Mapping[str, bytes],
    ):
        """`files` are what `save` writes: the tokenizer's own and those of BESIDE_FILES that there are."""
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id if pad_id != eos_id else None
        stops = [eos_id, *map(special_ids.get, STOP_NAMES), *_generation_stops(files)]
        self.stop_ids = tuple(sorted({stop for stop in stops if stop is not None}))
        self.chat_template = _chat_template(files)
        self._files = files
        names = sorted(special_ids, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    def encode(self, text: str, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Returns the token ids of `text`; `bos` and `eos` add begin and end tokens, where they exist and are not there already."""
        ids = self._encode_with_special(text) if allow_special else self._encode_text(text)
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids = [*ids, self.eos_id]
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Returns the token ids of text that goes on where other text ends: without the space that some tokenizers put before a text."""
        newline, joined = self._encode_text("\n"), self._encode_text(f"\n{text}")
        adds_space = self._encode_text("\na") != [*newline, *self._encode_text("a")]
        return joined[len(newline) :] if adds_space and joined[: len(newline)] == newline else self._encode_text(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids` without special tokens; bytes that are not UTF-8 become replacement characters."""
        return self._decode_ids([int(i) for i in ids])

    def split_special(self, text: str) -> list[str]:
        """Cuts `text` at the special tokens it spells: plain parts (possibly empty) at the even places, special tokens at the odd ones."""
        return self._special_pattern.split(text) if self._special_pattern else [text]

    @functools.cached_property
    def bytes_of_tokens(self) -> np.ndarray:
        """Returns `num_bytes` of every id: int64 [vocabulary]."""
        return np.array([self.num_bytes(i) for i in range(self.vocab_size)])

    @property
    def generation_config(self) -> dict[str, Any]:
        """Returns the special ids that generation needs: begin, padding, and every id that ends an answer."""
        told, stop = read_config(self._files, GENERATION_FILE), list(self.stop_ids)
        own = (self.bos_id, stop[0] if len(stop) == 1 else stop or None, self.pad_id)
        return {name: told.get(name) if i is None else i for name, i in zip(SPECIAL_ID_FIELDS, own, strict=True)}

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files into `directory`, which `load_tokenizer` then accepts. Raises UserError where that cannot be.

        What is there already is left alone, and so survives a disk that has become full.
        """
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            for path, content in ((Path(directory) / name, content) for name, content in self._files.items()):
                if not path.is_file() or path.read_bytes() != content:
                    path.write_bytes(content)
        except OSError as error:
            raise UserError(f"cannot write the tokenizer to {directory} ({error.strerror}): mend that, or choose another place") from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns what is equal for tokenizers that write the same streams, whatever file format they came from."""
        behaviour = [self.vocab_size, self.bos_id, self.eos_id, self.encode(PROBE)]
        return hashlib.sha256(json.dumps(behaviour).encode()).hexdigest()

    def _encode_with_special(self, text: str) -> list[int]:
        first, *rest = self.split_special(text)
        encode_rest = self.encode_continuation if self.adds_space_once else self._encode_text
        encoded = (encode_rest(part) if i % 2 else [self.special_ids[part]] for i, part in enumerate(rest))
        return [*self._encode_text(first), *itertools.chain.from_iterable(encoded)]

    @abc.abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes of a text that the token stands for, which may be a part of a character; none for special tokens."""

    def num_bytes(self, token_id: int) -> int:
        """Returns how many bytes `token_bytes` has."""
        return len(self.token_bytes(token_id))

    @abc.abstractmethod
    def _encode_text(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _decode_ids(self, ids: list[int]) -> str: ...


def read_config(files: Mapping[str, bytes], name: str = CONFIG_FILE) -> dict[str, Any]:
    return json.loads(files.get(name, b"{}"))


def special_names(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns what the files beside a tokenizer call the begin token ("bos_token"), the end token and so on."""
    named = read_config(files, SPECIAL_FILE) | {field: token for field, token in read_config(files).items() if token is not None}
    contents = {field: token["content"] if isinstance(token, dict) else token for field, token in named.items() if field.endswith("_token")}
    return {field: content for field, content in contents.items() if isinstance(content, str)}


def added_tokens(files: Mapping[str, bytes]) -> dict[int, dict[str, Any]]:
    """Returns the tokens that the files beside a tokenizer list as added, by id: each with its content, whether it is special, and how it
    treats the spaces around it, as transformers reads them (of two lists, the one in tokenizer_config.json holds)."""
    more = read_config(files, SPECIAL_FILE).get("additional_special_tokens") or read_config(files).get("additional_special_tokens") or []
    special = {*special_names(files).values(), *(token["content"] if isinstance(token, dict) else token for token in more), *STOP_NAMES}
    listed = {int(i): {"content": name, "special": name in special} for name, i in read_config(files, ADDED_FILE).items()}
    return dict(sorted((listed | {int(i): token for i, token in (read_config(files).get("added_tokens_decoder") or {}).items()}).items()))


def _chat_template(files: Mapping[str, bytes]) -> str | None:
    """Returns the chat template; where a model has several, the one named "default"."""
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode()
    template = read_config(files).get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _generation_stops(files: Mapping[str, bytes]) -> list[int]:
    stops = read_config(files, GENERATION_FILE).get("eos_token_id")
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def import_extra(module: str, what: str, extra: str = "tokenizers") -> ModuleType:
    """Imports a package that is not in the core install; a missing one is a UserError that names the extra with it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"reading {what} needs the package {module}: pip install 'herd-jax[{extra}]'") from error


def byte_of_name(name: str) -> bytes:
    """Returns the byte that a token of one byte is named after, such as "<0x0A>"."""
    return bytes([int(name[3:5], 16)])
