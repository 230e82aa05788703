"""Trains a SentencePiece tokenizer that gives every text back exactly: byte-pair encoding, byte fallback, no normalisation."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from herd_jax.errors import UserError

SAMPLE_BYTES = 16 * 2**20  # a few seconds of training on two cores
PASSAGE_CHARS = 1_000  # texts are cut near this length: the trainer drops long ones


def train_sentencepiece(texts: Iterable[str], vocab_size: int, target_path: str | Path) -> None:
    """Trains on the first 16 MiB of `texts` and writes the model to `target_path`.

    The vocabulary has the 256 bytes and `<unk>`, `<s>`, `</s>`, `<pad>` in it. Raises UserError where the texts cannot fill
    `vocab_size` or it is too small for their characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_passages(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            pad_id=3,
            max_sentence_length=2**20,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rsplit("] ", 1)[-1].strip().rstrip(".") or "there is no text"
        raise UserError(f"no tokenizer of {vocab_size} tokens can be trained here: {reason}") from error
    Path(target_path).write_bytes(model.getvalue())


def _passages(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts into passages of 1,000 to 2,000 characters, at line ends where there are any, up to the size of the sample."""
    num_bytes = 0
    for text in texts:
        start = 0
        while start < len(text):
            line_end = text.find("\n", start + PASSAGE_CHARS, start + 2 * PASSAGE_CHARS)
            stop = line_end + 1 if line_end >= 0 else start + 2 * PASSAGE_CHARS
            passage = text[start:stop]
            num_bytes += len(passage.encode())
            if num_bytes > SAMPLE_BYTES:
                return
            yield passage
            start = stop
