"""Tokenizers behind one protocol: Llama 3 (tiktoken), SentencePiece, Hugging Face `tokenizer.json`, bytes.

`load_tokenizer` finds out by looking which one a file holds. Training one is not here (`sentencepiece_training.py`), nor is
the dialog format (`chat.py`).
Special tokens typed by a user stay text unless `allow_special`; a beginning-of-text token is never doubled;
`decode` leaves special tokens out; `save` writes what `load_tokenizer` needs to read the same tokenizer back.
"""

import abc
import base64
import functools
import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import sentencepiece

from herd_jax.errors import UserError

# The released tokenizer (section 3.2): its split pattern and its first special tokens; the rest of the 256 are reserved.
LLAMA3_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NUM_SPECIAL = 256
LLAMA3_NAMED_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
LLAMA3_MAX_CHARS = 400_000  # tiktoken overflows its stack on longer texts,
LLAMA3_MAX_RUN = 25_000  # and is quadratic in runs without a change between whitespace and the rest

# What common tokenizer.json files call their special tokens, where no tokenizer_config.json beside them says so.
HF_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")
HF_EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>")
HF_PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]")
HF_STOP_NAMES = (*HF_EOS_NAMES, "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>")

BYTES_FILE = b"bytes\n"  # the whole of what a saved byte tokenizer consists of
# Text whose ids tell tokenizers apart.
PROBE = "The naïve 1234567 cats'll  run:\n\n\tif (x_i >= 0.5) { return '<s>' }\r\n\r\n    第三章 привет हिन्दी 🙂 disestablished"


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    `special_ids` maps the text of each special token to its id. `bos_id`, `eos_id` and `pad_id` are None where there is none
    (a padding token equal to the end token counts as none: it would hide the real end). `stop_ids` end a generated answer.
    """

    def __init__(
        self,
        vocab_size: int,
        special_ids: dict[str, int],
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
        stop_ids: Iterable[int],
        files: dict[str, bytes],
    ):
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id if pad_id != eos_id else None
        self.stop_ids = tuple(sorted(set(stop_ids)))
        self._files = files
        names = sorted(special_ids, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, names))})")

    def encode(self, text: str, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; `bos` and `eos` add begin and end tokens, where they exist and are not there already."""
        ids = self._encode_with_special(text) if allow_special else self._encode_text(text)
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids = [*ids, self.eos_id]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; bytes that are not UTF-8 become replacement characters."""
        return self._decode_ids([int(i) for i in ids])

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files into `directory`, which `load_tokenizer` then accepts."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(directory) / name).write_bytes(content)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that write the same streams, whatever file format they came from."""
        behaviour = [self.vocab_size, self.bos_id, self.eos_id, self.encode(PROBE)]
        return hashlib.sha256(json.dumps(behaviour).encode()).hexdigest()

    def _encode_with_special(self, text: str) -> list[int]:
        parts = self._special_pattern.split(text) if self.special_ids else [text]
        # re.split puts the matches of its one group at the odd places.
        encoded = ([self.special_ids[part]] if i % 2 else self._encode_text(part) for i, part in enumerate(parts))
        return list(itertools.chain.from_iterable(encoded))

    @abc.abstractmethod
    def _encode_text(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _decode_ids(self, ids: list[int]) -> str: ...


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, then begin, end and padding."""

    def __init__(self) -> None:
        special_ids = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257, "<|pad|>": 258}
        super().__init__(259, special_ids, 256, 257, 258, [257], {"tokenizer.bytes": BYTES_FILE})

    def _encode_text(self, text: str) -> list[int]:
        return list(text.encode())

    def _decode_ids(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Llama3Tokenizer(Tokenizer):
    """A tiktoken rank file in the Llama 3 layout: the ranks, then 256 special tokens (ids from 128,000 in the released file)."""

    def __init__(self, data: bytes) -> None:
        tiktoken = _import_extra("tiktoken", "a Llama 3 tokenizer.model")
        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        num_reserved = LLAMA3_NUM_SPECIAL - len(LLAMA3_NAMED_SPECIAL)
        reserved = (f"<|reserved_special_token_{2 + i}|>" for i in range(num_reserved))
        special = {name: len(ranks) + i for i, name in enumerate((*LLAMA3_NAMED_SPECIAL, *reserved))}
        self._encoding = tiktoken.Encoding(
            name="llama3", pat_str=LLAMA3_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self._num_ranks = len(ranks)
        super().__init__(
            len(ranks) + LLAMA3_NUM_SPECIAL,
            special,
            bos_id=special["<|begin_of_text|>"],
            eos_id=special["<|end_of_text|>"],
            pad_id=special["<|finetune_right_pad_id|>"],
            stop_ids=(special["<|end_of_text|>"], special["<|eom_id|>"], special["<|eot_id|>"]),
            files={"tokenizer.model": data},
        )

    def _encode_text(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self._encoding.encode_ordinary, _llama3_chunks(text))))

    def _decode_ids(self, ids: list[int]) -> str:
        return self._encoding.decode([i for i in ids if i < self._num_ranks])


def _llama3_chunks(text: str) -> Iterator[str]:
    """Cuts `text` where the released tokenizer cuts it: every 400,000 characters, and inside too long runs."""
    long_run = re.compile(rf"(?<!\S)\S{{{LLAMA3_MAX_RUN + 1},}}|(?<!\s)\s{{{LLAMA3_MAX_RUN + 1},}}")
    for offset in range(0, len(text), LLAMA3_MAX_CHARS):
        chunk = text[offset : offset + LLAMA3_MAX_CHARS]
        runs = long_run.finditer(chunk)
        cuts = [cut for run in runs for cut in range(run.start() + LLAMA3_MAX_RUN, run.end(), LLAMA3_MAX_RUN)]
        for start, stop in itertools.pairwise([0, *cuts, len(chunk)]):
            yield chunk[start:stop]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, data: bytes) -> None:
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        special = {processor.id_to_piece(i): i for i in range(processor.vocab_size()) if processor.is_control(i)}
        bos_id, eos_id, pad_id = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id(), processor.pad_id()))
        # SentencePiece writes a space as U+2581, so that character itself would come back as a space: it goes in as bytes,
        # where the model has them and does not put a space before every text.
        space_as_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        is_exact = all(map(processor.is_byte, space_as_bytes)) and "\u2581" not in processor.encode("a", out_type=str)[0]
        self._space_as_bytes = space_as_bytes if is_exact else None
        stop_ids = [] if eos_id is None else [eos_id]
        super().__init__(processor.vocab_size(), special, bos_id, eos_id, pad_id, stop_ids, {"tokenizer.model": data})

    def _encode_text(self, text: str) -> list[int]:
        if self._space_as_bytes is None or "\u2581" not in text:
            return self._processor.encode(text)
        first, *rest = (self._processor.encode(part) for part in text.split("\u2581"))
        return [*first, *itertools.chain.from_iterable((*self._space_as_bytes, *part) for part in rest)]

    def _decode_ids(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; `tokenizer_config.json`, where it lies beside, names the begin, end and padding tokens."""

    def __init__(self, files: dict[str, bytes]) -> None:
        tokenizers = _import_extra("tokenizers", "a tokenizer.json")
        self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are plain text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        config = json.loads(files.get("tokenizer_config.json", b"{}"))

        def id_of(field: str, usual_names: Sequence[str]) -> int | None:
            token = config.get(field)
            name = token["content"] if isinstance(token, dict) else token
            names = [name] if name else usual_names
            return next((vocabulary[name] for name in names if name in vocabulary), None)

        eos_id = id_of("eos_token", HF_EOS_NAMES)
        super().__init__(
            max(vocabulary.values()) + 1,
            special,
            bos_id=id_of("bos_token", HF_BOS_NAMES),
            eos_id=eos_id,
            pad_id=id_of("pad_token", HF_PAD_NAMES),
            stop_ids=(i for i in (eos_id, *map(special.get, HF_STOP_NAMES)) if i is not None),
            files=files,
        )

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode_ids(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer `"bytes"`, or that of a file or directory, recognised by its content.

    Raises UserError where there is none, where the file is damaged or of another kind, or where its library is not installed.
    """
    if str(name_or_path) == "bytes":
        return ByteTokenizer()
    path = _tokenizer_file(Path(name_or_path).expanduser())
    data = path.read_bytes()
    try:
        if data == BYTES_FILE:
            return ByteTokenizer()
        if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data):
            return Llama3Tokenizer(data)
        if data.lstrip()[:1] == b"{":
            config = path.with_name("tokenizer_config.json")
            beside = {config.name: config.read_bytes()} if config.is_file() else {}
            return HuggingFaceTokenizer({"tokenizer.json": data, **beside})
        return SentencePieceTokenizer(data)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception or RuntimeError on a file that they cannot read
        kinds = "a tiktoken rank file, a SentencePiece model or a Hugging Face tokenizer.json"
        raise UserError(f"{path} is not {kinds}, or is damaged: name another tokenizer") from error


def _tokenizer_file(path: Path) -> Path:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer.bytes")
    candidates = [path / name for name in names] if path.is_dir() else [path]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        missing = f"holds none of {', '.join(names)}" if path.is_dir() else "does not exist"
        raise UserError(f'tokenizer {path} {missing}: name "bytes", a tokenizer file or a directory that holds one')
    return found


def _import_extra(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"reading {what} needs the package {module}: pip install 'herd-jax[tokenizers]'") from error
