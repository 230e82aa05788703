"""Parts: documents tokenized by one process, before they become a stream, and the joining of parts to a training and a validation stream.

A part is two files: `NAME.documents`, a DOCUMENT for each, and `NAME.tokens`, their ids one after another.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from herd_jax.data.streams import StreamWriter, token_dtype
from herd_jax.errors import UserError
from herd_jax.text.tokenizer import Tokenizer

# A document of a part: its length, the hash of its text (which decides its split), the UTF-8 bytes of its text.
DOCUMENT = np.dtype([("num_tokens", "<i8"), ("hash", "<u8"), ("num_bytes", "<i8")])


def write_part(tokenizer: Tokenizer, texts: Iterable[str], part: Path) -> None:
    """Writes documents in the order given: their tokens to `part.tokens`, a DOCUMENT for each to `part`."""
    with part.open("wb") as documents, part.with_suffix(".tokens").open("wb") as tokens:
        for text in texts:
            ids = np.array(tokenizer.encode(text, bos=True, eos=True), token_dtype(tokenizer.vocab_size))
            content = text.encode()
            if tokenizer.is_lossless and (num_bytes := int(tokenizer.bytes_of_tokens[ids].sum())) != len(content):
                raise UserError(
                    f"the tokenizer turned a document of {len(content)} bytes into tokens of {num_bytes}: its files are damaged, so copy them again"
                )
            digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
            tokens.write(ids.data)
            documents.write(np.array((len(ids), digest, len(content)), DOCUMENT).tobytes())


def validation_rule(parts: Sequence[Path], fraction: float) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from hashes of documents to whether they are held out; both splits get some where two documents differ."""
    limit = np.uint64(int(fraction * 2**64))
    documents = np.concatenate([np.fromfile(part, DOCUMENT) for part in parts])
    held_out = documents["hash"] < limit
    if fraction == 0 or (len(documents) * fraction >= 1 and 0 < held_out.sum() < len(documents)):
        return lambda hashes: hashes < limit
    hashes, first = np.unique(documents["hash"], return_index=True)
    if len(hashes) == 1:
        return lambda hashes: np.zeros(len(hashes), bool)
    sizes = documents["num_bytes"][first]
    nearest = hashes[np.argmin(np.abs(sizes - fraction * sizes.sum()))]
    return lambda hashes: hashes == nearest


def write_streams(
    parts: Iterable[Path],
    is_held_out: Callable[[np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    directory: Path,
    tokenizer_path: str = "../tokenizer",
) -> list[tuple[int, int]]:
    """Joins the parts, in order, to the streams below `directory`; returns (train, validation) documents, tokens and bytes."""
    counts = np.zeros((3, 2), np.int64)
    settings = dict(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer_path, tokenizer_fingerprint=tokenizer.fingerprint)
    with StreamWriter(directory / "train", **settings) as train, StreamWriter(directory / "validation", **settings) as validation:
        for part in parts:
            documents = np.fromfile(part, DOCUMENT)
            tokens = np.fromfile(part.with_suffix(".tokens"), token_dtype(tokenizer.vocab_size))
            held_out = is_held_out(documents["hash"])
            for split, (writer, chosen) in enumerate(((train, ~held_out), (validation, held_out))):
                lengths, num_bytes = documents["num_tokens"][chosen], documents["num_bytes"][chosen].sum()
                split_tokens = tokens[np.repeat(chosen, documents["num_tokens"])]
                writer.append(split_tokens, lengths, num_bytes)
                counts[:, split] += len(lengths), len(split_tokens), num_bytes
    return [(int(train_count), int(validation_count)) for train_count, validation_count in counts]
