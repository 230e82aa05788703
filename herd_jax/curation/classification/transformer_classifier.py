"""A Transformer that gives a text the probabilities of labels: the quality score of the paper, where DistilRoBERTa learned from the
judgements of a chat model (section 3.1.1). Ours starts from random weights. Training and inference on one device.
"""

import dataclasses
import functools
import itertools
import json
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from herd_jax.curation.classification.labelled import Evaluation, Labelled, evaluate
from herd_jax.errors import UserError
from herd_jax.files import user_path, whole_directory
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.models.attention.attention import choose, has_tokamax
from herd_jax.models.encoder import Encoder, EncoderConfig
from herd_jax.models.params import Layout
from herd_jax.text.sentencepiece_training import train_sentencepiece
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer
from herd_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from herd_jax.training.state import StatePlan

FORMAT = "herd_jax transformer classifier 1"
LEAST_LENGTH = 32  # tokens of the shortest bucket
CHARACTERS_PER_TOKEN = 16  # of a text that are tokenized for each token that is read


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """`tokenizer` is a name or path as for `load_tokenizer`; None trains SentencePiece of `encoder.vocab_size` on the texts.
    `batch_tokens` are those of a batch, padding included."""

    encoder: EncoderConfig = EncoderConfig()
    tokenizer: str | None = None
    num_passes: int = 4
    batch_tokens: int = 4096
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.num_passes < 1:
            raise UserError(f"transformer.num_passes is {self.num_passes}: it must be 1 or more")
        if self.batch_tokens < self.encoder.max_tokens:
            raise UserError(f"transformer.batch_tokens {self.batch_tokens} must be encoder.max_tokens {self.encoder.max_tokens} or more")
        if not self.learning_rate > 0:
            raise UserError(f"transformer.learning_rate is {self.learning_rate}: it must be positive")


class TextBatch(NamedTuple):
    """Texts of about one length: `rows` are their numbers, fewer than B in the last batches."""

    rows: np.ndarray
    tokens_BT: np.ndarray
    num_tokens_B: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerClassifier:
    labels: tuple[str, ...]
    config: EncoderConfig
    params: dict
    tokenizer: Tokenizer

    batch_size = 256  # texts that are best scored together
    batch_tokens = 4096

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the probabilities of the labels: float32 [N, C], of the beginnings of the texts. A text's do not depend on those beside it,
        but for the last bits where batches differ in shape."""
        scores_NC = np.empty((len(texts), len(self.labels)), np.float32)
        ids = [_encode(self.tokenizer, text, self.config.max_tokens) for text in texts]
        for batch in _batches(ids, np.arange(len(ids)), self.batch_tokens):
            scores_NC[batch.rows] = np.asarray(self._score(self.params, batch.tokens_BT, batch.num_tokens_B))[: len(batch.rows)]
        return scores_NC

    @functools.cached_property
    def _score(self):
        encoder, dtype = _make_encoder(self.config, len(self.labels)), _compute_dtype()
        return jax.jit(lambda params, tokens, lengths: jax.nn.softmax(encoder.logits(_cast(params, dtype), tokens, lengths)))

    def save(self, directory: str | Path) -> None:
        """Writes config.json, weights.npz and the tokenizer into a new directory, which appears whole. Raises UserError if it exists."""
        directory = user_path(directory)
        if directory.exists():
            raise UserError(f"{directory} exists already: name another directory for the classifier, or move it away")
        header = {"format": FORMAT, "labels": self.labels, "encoder": dataclasses.asdict(self.config)}
        leaves = {f"{part}.{name}": np.asarray(value) for part, values in self.params.items() for name, value in values.items()}
        with whole_directory(directory) as unfinished:
            (unfinished / "config.json").write_text(json.dumps(header, indent=2) + "\n")
            np.savez(unfinished / "weights.npz", **leaves)
            self.tokenizer.save(unfinished / "tokenizer")

    @classmethod
    def load(cls, directory: str | Path) -> "TransformerClassifier":
        """Reads what `save` wrote. Raises UserError where the directory is absent, damaged or another."""
        directory = user_path(directory)
        if not directory.is_dir():
            raise UserError(f"the classifier {directory} does not exist: train it with the train-classifier command, or correct its path")
        try:
            header = json.loads((directory / "config.json").read_text())
            if header["format"] != FORMAT:
                raise ValueError(header["format"])
            labels, config = tuple(header["labels"]), EncoderConfig(**header["encoder"])
            declared = _make_encoder(config, len(labels)).declared
            with np.load(directory / "weights.npz", allow_pickle=False) as file:
                params = {part: {name: file[f"{part}.{name}"] for name in names} for part, names in declared.items()}
            for part, names in declared.items():
                if any(params[part][name].shape != declaration.canonical_shape for name, declaration in names.items()):
                    raise ValueError("shapes")
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            remedy = "train it again with the train-classifier command"
            raise UserError(f"{directory} is damaged or no transformer classifier: {remedy}") from error
        return cls(labels, config, jax.tree.map(jnp.asarray, params), load_tokenizer(directory / "tokenizer"))


def train(labelled: Labelled, config: TransformerConfig = TransformerConfig()) -> tuple[TransformerClassifier, Evaluation]:
    """Returns the classifier after the pass with the best loss on texts held out from learning, and how it does on others held out.

    AdamW with the house's schedule on the cross entropy with the targets, clipped at norm 1. The same for the same texts on one kind
    of device.
    """
    learned, stopping, reported = labelled.split()
    tokenizer = _make_tokenizer(learned.texts, config)
    shape = dataclasses.replace(config.encoder, vocab_size=tokenizer.vocab_size)
    ids = [_encode(tokenizer, text, shape.max_tokens) for text in learned.texts]
    rng = np.random.default_rng(config.seed)
    passes = [_shuffled(rng, ids, config.batch_tokens) for _ in range(config.num_passes)]
    num_steps = sum(map(len, passes))
    rates = OptimizerConfig(config.learning_rate, config.learning_rate / 100, num_steps // 10, num_steps, config.weight_decay)
    encoder = _make_encoder(shape, len(labelled.labels))
    optimizer = optax.chain(optax.clip_by_global_norm(rates.clip_norm), make_optimizer(rates, encoder.declared))
    layout = Layout.make(make_mesh(MeshConfig(dp=1), jax.devices()[:1]), shape.num_layers)
    _, params, moments = StatePlan(encoder.declared, optimizer, layout).init(config.seed)
    step = _make_step(encoder, optimizer)
    rate, numbers = learning_rate(rates), itertools.count(1)
    best, best_loss = None, np.inf
    for batches in passes:
        for batch in batches:
            targets_BC = np.zeros((len(batch.tokens_BT), len(labelled.labels)), np.float32)  # 0 for the rows that only fill the batch
            targets_BC[: len(batch.rows)] = learned.targets_NC[batch.rows]
            params, moments = step(params, moments, rate(next(numbers)), batch.tokens_BT, batch.num_tokens_B, targets_BC)
        classifier = TransformerClassifier(labelled.labels, shape, jax.tree.map(jnp.copy, params), tokenizer)
        loss = evaluate(classifier.scores(stopping.texts), stopping.targets_NC).loss
        if loss < best_loss:
            best, best_loss = classifier, loss
    return best, evaluate(best.scores(reported.texts), reported.targets_NC)


def _make_step(encoder: Encoder, optimizer: optax.GradientTransformationExtraArgs):
    dtype = _compute_dtype()

    def loss(params, tokens_BT, num_tokens_B, targets_BC):
        logits_BC = encoder.logits(_cast(params, dtype), tokens_BT, num_tokens_B)
        return -(targets_BC * jax.nn.log_softmax(logits_BC)).sum() / targets_BC.sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, rate, *batch):
        updates, moments = optimizer.update(jax.grad(loss)(params, *batch), moments, params, learning_rate=rate)
        return optax.apply_updates(params, updates), moments

    return step


def _make_encoder(config: EncoderConfig, num_classes: int) -> Encoder:
    wanted = "auto" if has_tokamax() else "blockwise"  # fast enough for short texts
    return Encoder.make(config, num_classes, choose(wanted, platform=jax.default_backend(), context_parallel=False, document_mask=True))


def _compute_dtype():
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _cast(params, dtype):
    return jax.tree.map(lambda value: value.astype(dtype), params)


def _make_tokenizer(texts: list[str], config: TransformerConfig) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tokenizer.model"
        train_sentencepiece(map(_printable, texts), config.encoder.vocab_size, path)
        return load_tokenizer(path)


def _encode(tokenizer: Tokenizer, text: str, max_tokens: int) -> np.ndarray:
    return np.asarray(tokenizer.encode(_printable(text[: max_tokens * CHARACTERS_PER_TOKEN]), bos=True)[:max_tokens], np.int32)


def _printable(text: str) -> str:
    """Returns the text with question marks for lone surrogates, which tokenizers refuse."""
    return text.encode(errors="replace").decode()


def _shuffled(rng: np.random.Generator, ids: list[np.ndarray], batch_tokens: int) -> list[TextBatch]:
    batches = list(_batches(ids, rng.permutation(len(ids)), batch_tokens))
    return [batches[i] for i in rng.permutation(len(batches))]


def _batches(ids: list[np.ndarray], order: np.ndarray, batch_tokens: int) -> Iterator[TextBatch]:
    """Yields texts in `order`, of lengths within a factor of 2, as many to a batch as `batch_tokens` hold: a handful of shapes for all."""
    lengths = np.asarray([max(LEAST_LENGTH, 1 << (len(ids[i]) - 1).bit_length()) for i in order])
    for length in np.unique(lengths):
        size = max(1, batch_tokens // int(length))
        mine = order[lengths == length]
        for rows in (mine[start : start + size] for start in range(0, len(mine), size)):
            tokens_BT, num_tokens_B = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
            for row, i in enumerate(rows):
                tokens_BT[row, : len(ids[i])], num_tokens_B[row] = ids[i], len(ids[i])
            yield TextBatch(rows, tokens_BT, num_tokens_B)
