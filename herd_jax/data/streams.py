"""The token stream: documents as flat token ids on disk, memory-mapped, independent of any sequence length.

A stream is a directory: `shard-00000.tokens` (little-endian uint16 or uint32), `shard-00000.ends` (int64 offsets in the shard
at which its documents end), further shards, and `stream.json`, which is written last. Documents never straddle shards. Text is
not handled here (`tokenization.py`), nor are rows of a sequence length (`rows.py`).
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from herd_jax.errors import UserError
from herd_jax.files import whole_file

HEADER = "stream.json"
DTYPES = ("uint16", "uint32")
FORMAT = "herd_jax token stream 1"
SHARD_TOKENS = 2**30  # a shard takes no more documents after this many tokens: few files, at most some GiB each
SAMPLED_SHARDS, SAMPLED_BYTES, SAMPLED_BLOCK = 32, 2**20, 2**16  # that a fingerprint reads: shards, bytes of a file, bytes in a row
MAX_OPEN_SHARDS = 256  # mapped files that a stream keeps open


class TokenStream:
    """Reads a stream. Any number of threads may read; a pickled stream opens its directory again.

    Raises UserError where the directory is missing, foreign, damaged or holds no documents.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header = _read_header(self.path)
        self.vocab_size: int = header["vocab_size"]
        self.num_bytes: int = header["num_bytes"]  # UTF-8 bytes of the text, without special tokens
        self.tokenizer_path = self.path / header["tokenizer"]
        self.tokenizer_fingerprint: str = header["tokenizer_fingerprint"]
        self.num_documents: int = sum(header["shard_documents"])
        self._dtype = np.dtype(header["dtype"]).newbyteorder("<")
        self._starts = np.cumsum([0, *header["shard_tokens"]])  # [shards + 1], in tokens
        self.num_tokens = int(self._starts[-1])
        for shard, counts in enumerate(zip(header["shard_tokens"], header["shard_documents"], strict=True)):
            self._check_shard(shard, *counts)
        if self.num_tokens == 0:
            raise UserError(f"token stream {self.path} is empty: tokenize more documents into it")
        self._open_shard = functools.lru_cache(MAX_OPEN_SHARDS)(self._map_shard)

    def __reduce__(self) -> tuple[type["TokenStream"], tuple[Path]]:
        return TokenStream, (self.path,)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `[start, stop)` of the stream, as a fresh int32 array."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        out = np.empty(stop - start, np.int32)
        for shard, first, last in self._shards_of(start, stop):
            offset = self._starts[shard]
            out[first - start : last - start] = self._open_shard(shard)[0][first - offset : last - offset]
        return out

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns a text that is the same for the same documents and tokenizer, wherever the stream lies: it is made of the header, which has a
        digest of all tokens, and of blocks of the files, evenly spaced: all of a small stream."""
        header = json.loads((self.path / HEADER).read_bytes())
        digest = hashlib.blake2b(json.dumps({key: value for key, value in header.items() if key != "tokenizer"}).encode(), digest_size=16)
        shards = np.linspace(0, len(self._starts) - 2, min(len(self._starts) - 1, SAMPLED_SHARDS)).astype(int)
        for shard in shards:
            for file in _shard_files(self.path, shard):
                digest.update(_sample(file))
        return digest.hexdigest()

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Returns the ascending int64 offsets `e`, `start < e <= stop`, at which a document ends (and the next, if any, begins)."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        found = [np.empty(0, np.int64)]
        for shard, first, last in self._shards_of(start, stop):
            offset, ends = self._starts[shard], self._open_shard(shard)[1]
            low, high = np.searchsorted(ends, [first - offset, last - offset], side="right")
            found.append(ends[low:high] + offset)
        return np.concatenate(found)

    def _shards_of(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Returns the shards that `[start, stop)` touches, each with its part of the range."""
        if start == stop:
            return []
        first_shard = np.searchsorted(self._starts, start, side="right") - 1
        last_shard = np.searchsorted(self._starts, stop, side="left") - 1
        shards = range(first_shard, last_shard + 1)
        return [(i, max(start, int(self._starts[i])), min(stop, int(self._starts[i + 1]))) for i in shards]

    def _map_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, ends = _shard_files(self.path, shard)
        return np.memmap(tokens, self._dtype, mode="r"), np.memmap(ends, "<i8", mode="r")

    def _check_shard(self, shard: int, num_tokens: int, num_documents: int) -> None:
        sizes = (num_tokens * self._dtype.itemsize, num_documents * 8)
        for file, size in zip(_shard_files(self.path, shard), sizes, strict=True):
            actual = file.stat().st_size if file.is_file() else 0
            if actual != size:
                raise UserError(f"{file} has {actual} bytes where {HEADER} says {size}: tokenize its sources again")


class StreamWriter:
    """Writes a stream into a directory that it makes: `with StreamWriter(...) as writer: writer.append(...)`.

    The stream becomes readable when the block ends without an exception. `tokenizer` is the path of the tokenizer's directory
    relative to the stream.
    """

    def __init__(
        self,
        path: str | Path,
        vocab_size: int,
        tokenizer: str = "../tokenizer",
        tokenizer_fingerprint: str = "",
        shard_tokens: int = SHARD_TOKENS,
    ):
        self._path = Path(path)
        self._path.mkdir(parents=True)
        self._dtype = token_dtype(vocab_size)
        self._max_shard_tokens = shard_tokens
        self._lengths_digest, self._tokens_digest = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        self._header = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            "vocab_size": vocab_size,
            "num_bytes": 0,
            "digest": "",
            "tokenizer": tokenizer,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "shard_tokens": [],
            "shard_documents": [],
        }

    def __enter__(self) -> Self:
        return self

    def append(self, tokens: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        """Adds documents: their `tokens` one after another, the length of each in tokens (none 0), the bytes of all their text."""
        assert np.sum(lengths) == len(tokens) and np.all(np.greater(lengths, 0))
        if len(tokens) == 0:
            return
        shard_tokens, shard_documents = self._header["shard_tokens"], self._header["shard_documents"]
        if not shard_tokens or shard_tokens[-1] >= self._max_shard_tokens:
            shard_tokens.append(0)
            shard_documents.append(0)
        ends = shard_tokens[-1] + np.cumsum(lengths)
        for file, values in zip(
            _shard_files(self._path, len(shard_tokens) - 1), (tokens.astype(self._dtype), ends.astype("<i8")), strict=True
        ):
            with file.open("ab") as out:
                out.write(values.data)
        shard_tokens[-1] += len(tokens)
        shard_documents[-1] += len(lengths)
        self._header["num_bytes"] += int(num_bytes)
        self._lengths_digest.update(np.asarray(lengths, "<i8").data)
        self._tokens_digest.update(tokens.astype(self._dtype).data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            return
        for file in self._path.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        self._header["digest"] = f"{self._lengths_digest.hexdigest()} {self._tokens_digest.hexdigest()}"  # of the lengths, and of all tokens
        with whole_file(self._path / HEADER, "w", sync=True) as header:
            header.write(json.dumps(self._header))


def _sample(file: Path) -> bytes:
    size, count = file.stat().st_size, SAMPLED_BYTES // SAMPLED_BLOCK
    with file.open("rb") as data:
        if size <= SAMPLED_BYTES:
            return data.read()
        parts = []
        for number in range(count):
            data.seek((size - SAMPLED_BLOCK) * number // (count - 1))
            parts.append(data.read(SAMPLED_BLOCK))
        return b"".join(parts)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest type of the format that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _shard_files(path: Path, shard: int) -> tuple[Path, Path]:
    return path / f"shard-{shard:05d}.tokens", path / f"shard-{shard:05d}.ends"


def _read_header(path: Path) -> dict:
    remedy = "make one with python -m herd_jax.tokenize"
    file = path / HEADER
    if not file.is_file():
        missing = f"has no {HEADER}" if path.is_dir() else "does not exist"
        raise UserError(f"token stream {path} {missing}: {remedy}")
    try:
        header = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {remedy}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{file} does not describe a token stream of this version: {remedy}")
    counts = [header.get("vocab_size"), header.get("num_bytes"), *_list(header, "shard_tokens"), *_list(header, "shard_documents")]
    texts = [header.get("dtype"), header.get("tokenizer"), header.get("tokenizer_fingerprint")]
    if not all(type(count) is int for count in counts) or not all(isinstance(text, str) for text in texts) or texts[0] not in DTYPES:
        raise UserError(f"{file} is damaged (a field is missing or of another type): {remedy}")
    return header


def _list(header: dict, name: str) -> list:
    value = header.get(name)
    return value if isinstance(value, list) else [None]
