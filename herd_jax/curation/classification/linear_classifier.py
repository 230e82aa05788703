"""A linear classifier over words and pairs of words, as fastText's: the fast judge of "would an encyclopedia cite it" (section 3.1.1).

A text's logits are the mean of the weights of its words and bigrams, which are hashed into a table. That is fastText's model without the
narrow layer between, which for few labels saves nothing.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from herd_jax.curation.classification.labelled import Evaluation, Labelled, evaluate
from herd_jax.curation.text import words
from herd_jax.errors import UserError
from herd_jax.files import user_path, whole_file

FORMAT = "herd_jax linear classifier 2"
MAX_WORDS = 1 << 16  # of a text, from its beginning


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """`num_features` is the size of the table (8 MB of memory for 2^20 features and two labels); `patience` is how many passes without a
    better held-out loss end the training."""

    num_features: int = 2**20
    max_passes: int = 20
    patience: int = 2
    batch_size: int = 32
    learning_rate: float = 3.0
    seed: int = 0

    def __post_init__(self):
        for name in ("num_features", "max_passes", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"linear.{name} is {getattr(self, name)}: it must be 1 or more")
        if not self.learning_rate > 0:
            raise UserError(f"linear.learning_rate is {self.learning_rate}: it must be positive")


@dataclasses.dataclass(frozen=True, eq=False)
class LinearClassifier:
    """`weights_FC` and `bias_C` are float32; `fingerprint` is equal for classifiers that judge alike."""

    labels: tuple[str, ...]
    config: LinearConfig
    weights_FC: np.ndarray
    bias_C: np.ndarray

    batch_size = 1  # texts that are best scored together: one, while its words are remembered

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the probabilities of the labels: float32 [N, C]. Memory for a text: that of `words.split`, and 4 MB."""
        logits = [_mean(self.weights_FC, features(text, self.config.num_features)) for text in texts]
        return _softmax(np.asarray(logits, np.float32).reshape(-1, len(self.labels)) + self.bias_C)

    @property
    def fingerprint(self) -> str:
        header = json.dumps([FORMAT, self.labels, self.config.num_features]).encode()
        return hashlib.sha256(header + self.weights_FC.tobytes() + self.bias_C.tobytes()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes one .npz; it appears whole or not at all."""
        path = user_path(path)
        header = {"format": FORMAT, "labels": self.labels, "config": dataclasses.asdict(self.config), "fingerprint": self.fingerprint}
        with whole_file(path) as file:
            np.savez_compressed(file, header=json.dumps(header), weights=self.weights_FC, bias=self.bias_C)

    @classmethod
    def load(cls, path: str | Path) -> "LinearClassifier":
        """Reads what `save` wrote. Raises UserError where the file is absent, damaged or another."""
        if not user_path(path).is_file():
            raise UserError(f"the linear classifier {path} does not exist: train it with the train-classifier command, or correct its path")
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                found = cls(tuple(header["labels"]), LinearConfig(**header["config"]), file["weights"], file["bias"])
                whole = header["format"] == FORMAT and header["fingerprint"] == found.fingerprint
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged or no linear classifier: train it again with the train-classifier command") from error
        if not whole:
            raise UserError(f"{path} is damaged or of another version: train it again with the train-classifier command")
        return found


def features(text: str, num_features: int) -> np.ndarray:
    """Returns the places of the text's words and bigrams in the table, as often as they occur: int64 [n]."""
    folded = words.split(text).folded_without_digits[:MAX_WORDS]
    return (np.concatenate([folded, words.ngrams(folded, 2)]) % np.uint64(num_features)).astype(np.int64)


def train(labelled: Labelled, config: LinearConfig = LinearConfig()) -> tuple[LinearClassifier, Evaluation]:
    """Returns the classifier with the best loss on texts held out from learning, and how it does on others held out. It is the same for the same
    texts.

    AdaGrad on the cross entropy. Memory: 8 bytes for each word, and three
    tables of weights.
    """
    learned, stopping, reported = labelled.split()
    bags = [features(text, config.num_features).astype(np.int32) for text in learned.texts]
    some = np.asarray([i for i, bag in enumerate(bags) if len(bag)])  # a text without words teaches nothing
    num_labels, rng = len(labelled.labels), np.random.default_rng(config.seed)
    weights, bias = np.zeros((config.num_features, num_labels), np.float32), np.zeros(num_labels, np.float32)
    squares = np.zeros_like(weights), np.zeros_like(bias)
    best, best_loss, waited = None, np.inf, 0
    for _ in range(config.max_passes):
        for batch in np.array_split(rng.permutation(some), max(1, len(some) // config.batch_size)):
            _learn(weights, bias, squares, [bags[i] for i in batch], learned.targets_NC[batch], config.learning_rate)
        classifier = LinearClassifier(labelled.labels, config, weights, bias)
        loss = evaluate(classifier.scores(stopping.texts), stopping.targets_NC).loss
        if loss < best_loss:
            best, best_loss, waited = LinearClassifier(labelled.labels, config, weights.copy(), bias.copy()), loss, 0
        else:
            waited += 1
        if waited == config.patience:
            break
    return best, evaluate(best.scores(reported.texts), reported.targets_NC)


def _learn(weights_FC, bias_C, squares, bags: list[np.ndarray], targets_BC: np.ndarray, rate: float) -> None:
    """Makes one step of AdaGrad, in place."""
    flat, lengths = np.concatenate(bags), np.asarray([len(bag) for bag in bags])
    starts = np.cumsum(lengths) - lengths
    logits_BC = np.add.reduceat(weights_FC[flat], starts) / lengths[:, None] + bias_C
    error_BC = (_softmax(logits_BC) - targets_BC) / len(bags)
    order = np.argsort(flat, kind="stable")
    first = np.flatnonzero(np.diff(flat[order], prepend=-1))
    each_nC = np.repeat(error_BC / lengths[:, None], lengths, axis=0)[order]
    touched, gradient_uC = flat[order[first]], np.add.reduceat(each_nC, first)
    squares[0][touched] += gradient_uC**2
    weights_FC[touched] -= rate * gradient_uC / (np.sqrt(squares[0][touched]) + 1e-8)
    gradient_C = error_BC.sum(axis=0)
    squares[1][:] += gradient_C**2
    bias_C -= rate * gradient_C / (np.sqrt(squares[1]) + 1e-8)


def _mean(weights_FC: np.ndarray, places: np.ndarray) -> np.ndarray:
    return weights_FC.take(places, axis=0).sum(axis=0) / max(1, len(places))


def _softmax(logits_NC: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)
