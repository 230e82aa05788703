"""Texts with the labels that a classifier learns: where they come from, what is held out, and how well a classifier does on that.

A target is a distribution over the labels: all on one where texts come in sets, soft where a judge gave it.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from herd_jax.curation.input.extraction import Extraction
from herd_jax.curation.input.reading import Reader, ReadingConfig, find_inputs, plan_tasks
from herd_jax.errors import UserError
from herd_jax.files import user_path

MAX_CHARACTERS = 100_000  # of a text that are kept: classifiers look at its beginning
HELD_OUT = 0.05  # of each label's texts, once to choose when to stop and once to report on
LEAST_TEXTS = 20  # of each label


def text_id(text: str) -> str:
    """Returns 16 hex digits that depend on the text alone."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def read_texts(sources: Sequence[str], text_field: str = "text") -> list[str]:
    """Returns the beginnings of the documents in files that globs name, read and extracted as in a run of curation. Raises UserError where there
    are none."""
    tasks, extraction, texts = plan_tasks(find_inputs(tuple(sources), leave_out=Path("/dev/null"))), Extraction(), []
    reader, reasons = Reader(tasks, ReadingConfig(text_field)), Counter()
    for rank in range(len(tasks)):
        texts += [doc.text[:MAX_CHARACTERS] for doc in reader.run(None, rank, len(tasks)) if extraction.filter(doc) is True]
        reasons.update(problem["reason"] for problem in reader.found)
    if not texts:
        reasons = "; ".join(reasons) or "they hold none"
        raise UserError(f"no text was found in {', '.join(sources)} ({reasons}): name files that hold text in field {text_field!r}")
    return texts


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """Texts with what they are to be classified as. `targets_NC`: float32, for each of N texts a distribution over the C labels."""

    labels: tuple[str, ...]
    texts: list[str]
    targets_NC: np.ndarray

    @classmethod
    def of_sets(cls, sets: Mapping[str, Iterable[str]]) -> "Labelled":
        """Takes one set of texts for each label; a text that comes again in its set is left out."""
        distinct = {label: list(dict.fromkeys(texts)) for label, texts in sets.items()}
        numbers = np.repeat(np.arange(len(sets)), [len(texts) for texts in distinct.values()])
        return cls(tuple(sets), sum(distinct.values(), []), np.eye(len(sets), dtype=np.float32)[numbers])

    @classmethod
    def of_judgements(cls, path: str | Path) -> "Labelled":
        """Reads what `labels.label_files` wrote. Raises UserError where the file is another."""
        try:
            lines = [json.loads(line) for line in user_path(path).read_text().splitlines()]
            labels = tuple(lines[0]["scores"])
            targets = np.asarray([[line["scores"][label] for label in labels] for line in lines], np.float32)
            return cls(labels, [line["text"] for line in lines], targets)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} cannot be read as a judge's labels ({error!r:.80}): make it with the label command") from error

    def split(self) -> tuple["Labelled", "Labelled", "Labelled"]:
        """Returns those to learn from, to choose when to stop, and to report on: each label's texts in the order of their hashes, so that
        equal texts stay together and the split depends on nothing else. Raises UserError where a label has too few."""
        if len(self.labels) < 2:
            raise UserError(f"there is only the label {', '.join(self.labels)}: a classifier needs two or more")
        parts: tuple[list, list, list] = ([], [], [])
        number_of = self.targets_NC.argmax(axis=1)
        for number, label in enumerate(self.labels):
            mine = sorted(np.flatnonzero(number_of == number), key=lambda i: text_id(self.texts[i]))
            if len(mine) < LEAST_TEXTS:
                raise UserError(f"label '{label}' has {len(mine)} different texts: give at least {LEAST_TEXTS}")
            held_out = int(np.ceil(len(mine) * HELD_OUT))
            for part, some in zip(parts, (mine[2 * held_out :], mine[:held_out], mine[held_out : 2 * held_out]), strict=True):
                part.extend(some)
        return tuple(Labelled(self.labels, [self.texts[i] for i in part], self.targets_NC[part]) for part in parts)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean cross entropy in nats; `auc` is that of each label against the rest, on average over the labels."""

    num_texts: int
    accuracy: float
    auc: float
    loss: float

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4f}, AUC {self.auc:.4f}, loss {self.loss:.4f} nats on {self.num_texts:,} texts"


def evaluate(scores_NC: np.ndarray, targets_NC: np.ndarray) -> Evaluation:
    """Compares predicted probabilities with the targets."""
    truth = targets_NC.argmax(axis=1)
    loss = -(targets_NC * np.log(np.maximum(scores_NC, 1e-12))).sum(axis=1).mean()
    areas = [auc(scores_NC[:, c], truth == c) for c in range(scores_NC.shape[1])]
    return Evaluation(len(truth), float((scores_NC.argmax(axis=1) == truth).mean()), float(np.mean(areas)), float(loss))


def auc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Returns how often a positive scores above a negative, ties counted half: the area under the ROC curve."""
    _, rank = np.unique(scores_N, return_inverse=True)
    positives, negatives = np.bincount(rank, positive_N), np.bincount(rank, ~positive_N)
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))
