"""Model-based quality: documents scored by a fast linear classifier, those that pass it by a transformer (section 3.1.1 of the paper)."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import field

from datatrove.data import Document

from herd_jax.curation.block import Block
from herd_jax.curation.classification.classifiers import in_batches, label_number, open_classifier
from herd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ThresholdConfig:
    """A document stays where the classifier at `path` gives `label` a probability of at least `least`, or that of its language in
    `languages`."""

    path: str  # of the classifier
    label: str = "yes"  # whose probability counts
    least: float = 0.5  # probability from which a document stays
    languages: dict[str, float] = field(default_factory=dict)  # such probabilities of single languages

    def __post_init__(self):
        for name, value in {"least": self.least, **{f"languages.{key}": value for key, value in self.languages.items()}}.items():
            if not 0 <= value <= 1:
                raise UserError(f"quality {name} is {value}: it must lie between 0, which keeps all, and 1")

    def of(self, doc: Document) -> float:
        return self.languages.get(doc.metadata.get("language", ""), self.least)


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    linear: ThresholdConfig | None = None
    transformer: ThresholdConfig | None = None


class Quality(Block):
    """Sets metadata "linear_quality" and "transformer_quality", of the classifiers that there are, and "quality", the last of them.

    NaN: the document was not scored, because it is source code, or by the transformer because the linear classifier drops it.
    """

    name = "quality"

    def __init__(self, config: QualityConfig):
        super().__init__()
        self.stages = {name: stage for name in ("linear", "transformer") if (stage := getattr(config, name))}
        if not self.stages:
            raise UserError("quality has no classifier: set quality.linear.path, quality.transformer.path or both, or leave the block out")

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for name in self.stages:
            # The linear one scores documents as they come, while their words are remembered; the transformer in batches.
            data = in_batches(data, self._classifiers[name][0].batch_size, functools.partial(self._score, name))
        return self.sift(data, self._verdict)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        for name in self.stages:
            self._score(name, [doc])
        return self._verdict(doc)

    def _verdict(self, doc: Document) -> bool | tuple[bool, str]:
        failed = next((name for name in self.stages if self._fails(name, doc)), None)
        return (False, f"below_{failed}_threshold") if failed else True

    def _score(self, name: str, docs: list[Document]) -> None:
        classifier, number = self._classifiers[name]
        due = [doc for doc in docs if doc.metadata.get("media_type") != "text/x-code"]
        if name == "transformer":
            due = [doc for doc in due if not self._fails("linear", doc)]
        for doc in docs:
            doc.metadata[f"{name}_quality"] = math.nan
        for doc, score in zip(due, classifier.scores([doc.text for doc in due])[:, number].tolist(), strict=True):
            doc.metadata[f"{name}_quality"] = score
        for doc in docs:
            doc.metadata["quality"] = doc.metadata[f"{name}_quality"]

    def _fails(self, name: str, doc: Document) -> bool:
        return name in self.stages and doc.metadata[f"{name}_quality"] < self.stages[name].of(doc)  # NaN does not

    @functools.cached_property
    def _classifiers(self) -> dict[str, tuple]:
        """Returns, by name, the classifier and the number of its label. Loaded in the process that uses them."""
        found = {}
        for name, stage in self.stages.items():
            classifier = open_classifier(stage.path)
            found[name] = classifier, label_number(classifier.labels, stage.label, stage.path)
        return found
