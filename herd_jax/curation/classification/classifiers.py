"""The two kinds of classifiers behind one door: opened by path, trained from files, run over documents in batches."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from datatrove.data import Document

from herd_jax.curation.classification import linear_classifier
from herd_jax.curation.classification.labelled import Labelled, read_texts
from herd_jax.curation.classification.linear_classifier import LinearClassifier
from herd_jax.errors import UserError
from herd_jax.files import user_path

KINDS = ("linear", "transformer")
BATCH_CHARACTERS = 2**24  # of the documents that wait for a batch to fill, but for the last one


def open_classifier(path: str):
    """Opens a LinearClassifier from a file, a TransformerClassifier from a directory: both have `labels`, `batch_size` and `scores(texts)`."""
    if not user_path(path).is_dir():
        return LinearClassifier.load(path)
    from herd_jax.curation.classification.transformer_classifier import TransformerClassifier  # not before it is needed: it starts jax

    return TransformerClassifier.load(path)


def read_labels(path: str) -> tuple[str, ...]:
    """Returns the labels of a classifier, without starting jax. Raises UserError where the classifier is absent, damaged or another."""
    if not user_path(path).is_dir():
        return LinearClassifier.load(path).labels
    try:
        return tuple(json.loads((user_path(path) / "config.json").read_text())["labels"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged or no transformer classifier: train it again with the train-classifier command") from error


def label_number(labels: Sequence[str], label: str, path: str) -> int:
    """Returns the number of a label. Raises UserError where the classifier at `path` does not know the label."""
    if label not in labels:
        raise UserError(f"the classifier {path} has no label '{label}': choose one of {', '.join(labels)}")
    return labels.index(label)


def train_classifier(kind: str, sets: Mapping[str, Sequence[str]], judged: str | None, target: str | Path, text_field: str = "text") -> str:
    """Trains a classifier on sets of files (label -> globs), or on a judge's labels (a file of `labels.label_files`), into `target`.

    Returns how it does on texts held out from it. Raises UserError for an unknown kind, sets that are too small, a target that exists.
    """
    if kind not in KINDS:
        raise UserError(f"the kind of classifier is '{kind}': it must be one of {', '.join(KINDS)}")
    if bool(sets) == bool(judged):
        raise UserError("a classifier learns from sets or from a judge's labels: give two or more --set LABEL=GLOB, or --judged FILE")
    if user_path(target).exists():
        raise UserError(f"{target} exists already: name another target for the classifier, or move it away")
    if judged:
        labelled = Labelled.of_judgements(judged)
    else:
        labelled = Labelled.of_sets({name: read_texts(globs, text_field) for name, globs in sets.items()})
    if kind == "linear":
        classifier, evaluation = linear_classifier.train(labelled)
    else:
        from herd_jax.curation.classification import transformer_classifier

        classifier, evaluation = transformer_classifier.train(labelled)
    classifier.save(target)
    numbers = labelled.targets_NC.argmax(axis=1)
    counts = ", ".join(f"{(numbers == i).sum():,} {name}" for i, name in enumerate(labelled.labels))
    return f"{kind} classifier of {counts}; held out: {evaluation}"


def in_batches(documents: Iterable[Document], size: int, visit: Callable[[list[Document]], None]) -> Iterator[Document]:
    """Yields the documents, after `visit` has seen them in batches of at most `size`."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if len(batch) == size or num_characters >= BATCH_CHARACTERS:
            visit(batch)
            yield from batch
            batch, num_characters = [], 0
    if batch:
        visit(batch)
        yield from batch

