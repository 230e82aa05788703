"""Rows of training and validation: token streams cut to a sequence length, packed with segment ids, shuffled by Grain and mixed.

Which source has its turn is decided in `mixture.py`; rows become global batches in `batches.py`.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import grain
import numpy as np

from herd_jax.data.mixture import Mixture
from herd_jax.data.streams import TokenStream
from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class MixPhase:
    """From `from_tokens` tokens of training on, the mixture is that of `sources`."""

    from_tokens: int  # tokens trained on before the mixture changes
    sources: dict[str, float]  # as data.sources


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read. `open_streams` checks it.

    `phases` change the mixture in flight (section 3.1.2): one begins at the first step before which at least its `from_tokens` have been
    trained on. It may add sources and leave some out; each goes on where it was.
    """

    sources: dict[str, float]  # directory made by herd_jax.tokenize -> weight (relative)
    tokenizer: str = ""  # name or path; empty: the one stored beside the first source
    document_mask: bool = True  # documents in a row do not see each other (section 3.2)
    phases: tuple[MixPhase, ...] = ()  # later mixtures, as the tokens trained on grow

    @property
    def mixtures(self) -> list[dict[str, float]]:
        return [self.sources, *(phase.sources for phase in self.phases)]

    @property
    def paths(self) -> list[str]:
        """Returns every source of the run, in the order in which they first appear."""
        return list(dict.fromkeys(path for sources in self.mixtures for path in sources))


def open_streams(config: DataConfig, split: Literal["train", "validation"]) -> list[TokenStream]:
    """Opens the streams of one split, in the order of `config.paths`.

    Raises UserError for no sources, a missing, damaged or empty one, one without a token to predict, a weight that is not positive and finite, sources of different
    tokenizers, or phases that do not follow one another.
    """
    starts = [0, *(phase.from_tokens for phase in config.phases)]
    if any(later <= earlier for earlier, later in zip(starts, starts[1:])):
        raise UserError(f"data.phases start from {starts[1:]} tokens: the first must start from 1 or more, each later one from more")
    for index, sources in enumerate(config.mixtures):
        _check_weights(sources, f"data.phases[{index - 1}].sources" if index else "data.sources")
    streams = [TokenStream(user_path(path) / split) for path in config.paths]
    for stream in streams:
        if stream.num_tokens == (stream.num_documents if config.document_mask else 1):
            raise UserError(
                f"token stream {stream.path} has no token to predict: each of its {stream.num_documents} documents is one token long, so make "
                "it from more text"
            )
    for stream in streams[1:]:
        if stream.tokenizer_fingerprint != streams[0].tokenizer_fingerprint:
            raise UserError(f"data.sources mixes tokenizers: {stream.path} and {streams[0].path} were made with different ones")
    return streams


def _check_weights(sources: dict[str, float], key: str) -> None:
    if not sources:
        raise UserError(f"{key} is empty: name at least one directory made by python -m herd_jax.tokenize")
    for path, weight in sources.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{key} gives {path} the weight {weight!r}: it must be a positive finite number")
        if not user_path(path).is_dir():
            raise UserError(f"data source {path} does not exist: {_meant(path, weight, sources, key)}")


def _meant(path: str, weight: float, sources: dict[str, float], key: str) -> str:
    """Returns the remedy; where a name with a colon or a comma was taken apart, how to write it."""
    for whole in (f"{path}:{weight:g}", *(",".join(names) for names in itertools.combinations(sources, 2) if path in names)):
        if user_path(whole).is_dir():
            written = str({whole: 1.0})
            return f'for the directory {whole} give --config.{key}="{written}"'
    return f"make it with python -m herd_jax.tokenize --target {path}"


def load_data_tokenizer(config: DataConfig, streams: Sequence[TokenStream]) -> Tokenizer:
    """Returns the tokenizer of `config`; raises UserError where it is not the one that made the streams."""
    path = config.tokenizer or streams[0].tokenizer_path
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != streams[0].tokenizer_fingerprint:
        raise UserError(f"{streams[0].path} was not made with the tokenizer {path}: leave data.tokenizer empty")
    return tokenizer


def check_vocabulary(streams: Sequence[TokenStream], model_vocab_size: int) -> None:
    """Raises UserError where a stream may hold token ids that a model of `model_vocab_size` has no embedding for."""
    for stream in streams:
        if stream.vocab_size > model_vocab_size:
            raise UserError(
                f"{stream.path} has token ids up to {stream.vocab_size - 1} but model.vocab_size is {model_vocab_size}: "
                f"set it to at least {stream.vocab_size}"
            )


class TrainingRows:
    """Rows without end; row i, for any i >= 0, depends on the streams, the mixture, `seq_len`, `seed` and i alone.

    Each source is shuffled anew in each of its epochs and gives every row once an epoch, also where the mixture changes. A row is a
    dict of arrays [S], see `StreamRows`. Raises UserError where `seq_len` is longer than a stream.
    """

    def __init__(self, streams: Sequence[TokenStream], mixture: Mixture, seq_len: int, seed: int, document_mask: bool = True):
        shortest = min(streams, key=lambda stream: stream.num_tokens)
        if shortest.num_tokens <= seq_len:
            raise UserError(
                f"train.seq_len {seq_len} is longer than the data: {shortest.path} has {shortest.num_tokens} tokens, "
                f"so the largest possible is {shortest.num_tokens - 1}"
            )
        # Grain shuffles epoch e with seed + e; hashing keeps neighbouring seeds and sources from sharing orders.
        seeds = np.random.SeedSequence(seed).generate_state(len(streams))
        self._mixture = mixture
        self._sources = [
            grain.MapDataset.source(StreamRows(stream, seq_len, document_mask)).shuffle(seed=int(source_seed)).repeat()
            for stream, source_seed in zip(streams, seeds, strict=True)
        ]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        source, row = self._mixture.locate(index)
        return self._sources[source][row]


def validation_rows(
    streams: Sequence[TokenStream], seq_len: int, num_rows: int, document_mask: bool = True
) -> list[grain.MapDataset]:
    """Returns rows of each stream, always the same ones, spaced evenly in it: together `num_rows`, in equal shares, or all where there are fewer."""
    sources = [StreamRows(stream, seq_len, document_mask) for stream in streams]
    shares, left = [0] * len(sources), num_rows
    for i, source in enumerate(sorted(range(len(sources)), key=lambda source: len(sources[source]))):
        shares[source] = min(len(sources[source]), left // (len(sources) - i))  # the longer ones after it give what a short stream cannot
        left -= shares[source]
    return [
        grain.MapDataset.source([k * len(rows) // share for k in range(share)]).map(rows.__getitem__)
        for rows, share in zip(sources, shares, strict=True)
    ]


class StreamRows:
    """One epoch of a stream in rows of S tokens that overlap by one, so that every token but the first is a target once.

    Row i starts at token i * S. The last row is padded. A row is a dict of arrays [S]:
    `tokens` and `targets` (the next token), int32;
    `loss_mask`, bool: False on padding and where the target belongs to another document;
    `segment_ids`, int32: 1, 2, ... for the documents of the row, 0 on padding;
    `positions`, int32: 0, 1, ... in each segment, also in a document that began in an earlier row.
    Without `document_mask` the row is one segment and only padding is masked.
    """

    def __init__(self, stream: TokenStream, seq_len: int, document_mask: bool):
        self._stream = stream
        self._seq_len = seq_len
        self._document_mask = document_mask

    def __len__(self) -> int:
        return -(-(self._stream.num_tokens - 1) // self._seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        seq_len = self._seq_len
        start = index * seq_len
        stop = min(start + seq_len + 1, self._stream.num_tokens)
        num_targets = stop - start - 1
        window = np.zeros(seq_len + 1, np.int32)
        window[: num_targets + 1] = self._stream.read(start, stop)
        begins = np.zeros(seq_len + 1, bool)  # whether a document begins at this token of the window
        if self._document_mask:
            begins[self._stream.document_ends(start, stop - 1) - start] = True
        index_S = np.arange(seq_len, dtype=np.int32)
        real_S = index_S < num_targets
        segment_start_S = np.maximum.accumulate(np.where(begins[:-1], index_S, 0))
        return {
            "tokens": np.where(real_S, window[:-1], 0),
            "targets": window[1:],
            "loss_mask": real_S & ~begins[1:],
            "segment_ids": np.where(real_S, 1 + np.cumsum(begins[:-1], dtype=np.int32), 0),
            "positions": np.where(real_S, index_S - segment_start_S, 0),
        }
