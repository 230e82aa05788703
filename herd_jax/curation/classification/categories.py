"""What documents are about: the categories of the paper's mix, and the topics of its knowledge classifier with the rates at which those of
which there is too much are kept (sections 3.1.1 and 3.1.2 of the paper).
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping

from datatrove.data import Document

from herd_jax.curation.block import Block
from herd_jax.curation.classification.classifiers import in_batches, label_number, open_classifier
from herd_jax.errors import UserError

MULTILINGUAL = "multilingual"
CATEGORIES = ("general", "math_and_reasoning", "code", MULTILINGUAL)
READ_CHARACTERS = 100_000  # of a document that the rules for lines look at

# Lines that only code, or only mathematics, is likely to have. Each alternative reads a line once.
CODE_LINE = re.compile(
    r"^[ \t]*(?:"
    r"(?:def|class|func|fn|function|public|private|static|import|from|package|using|namespace|template|struct|enum|impl|const|let|var)\b"
    r"[^.!?\n]{0,200}[:;{(=]"
    r"|(?:from\s+[\w.]+\s+)?import\s+[\w.*{]"
    r"|#\s*(?:include|define|ifdef|ifndef|endif|pragma)\b|#!/|>>> |\$ [a-z]|</?[a-z]+[ >]"
    r"|(?:return|if|for|while|elif|else|try|except|switch|case)\b[^\n]{0,200}[:;{]$"
    r"|[\w.\[\]>*&-]+\s*(?:[-+*/|&]?=|\()\s*[^\n]{0,200}[;,({\[)\]]$"
    r"|[{}()\[\];]+,?$"
    r")",
    re.MULTILINE,
)
MATH_LINE = re.compile(
    r"\\(?:frac|sum|int|sqrt|begin|mathbb|mathrm|left|alpha|beta|theta|lambda|infty|cdot|times|leq|geq|in|to)\b"
    r"|[∀∃∈∉⊂⊆∪∩∑∏∫√∂∇≤≥≠≈≡⇒⇔→∞⊢∧∨¬]|\b\w{1,3}\s?[=<>^]\s?[-+\w(]|\b(?:[Tt]heorem|[Ll]emma|[Pp]roof|Q\.E\.D|[Cc]orollary)\b"
)


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """The classifier at `path` says yes where it gives `label` a probability of at least `least`."""

    path: str  # of the classifier
    label: str = "yes"  # that means yes
    least: float = 0.5  # least probability of that label


@dataclasses.dataclass(frozen=True)
class CategoriesConfig:
    """Without a classifier for `code` or `reasoning` a rough rule decides: the share of lines that look like code, or like mathematics.
    `topics` is the path of a classifier whose likeliest label becomes the topic; without one topics are ""."""

    code: ClassifierConfig | None = None
    reasoning: ClassifierConfig | None = None
    topics: str | None = None  # path of a classifier whose likeliest label is the topic; none: no topics
    least_code_lines: float = 0.25  # share of lines that look like code, where no classifier decides
    least_math_lines: float = 0.25  # share of lines that look like mathematics, where no classifier decides
    home_language: str = "en"  # code of the language that is not multilingual

    def __post_init__(self):
        for name in ("least_code_lines", "least_math_lines"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"categories {name} is {getattr(self, name)}: it must be more than 0 and at most 1")


class Categories(Block):
    """Sets metadata "category", one of CATEGORIES, and "topic". Drops nothing."""

    name = "categories"

    def __init__(self, config: CategoriesConfig = CategoriesConfig()):
        super().__init__()
        self.config = config

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        size = max((classifier.batch_size for classifier, _ in self._classifiers.values()), default=1)
        return self.sift(in_batches(data, size, self._label), lambda doc: True)

    def filter(self, doc: Document) -> bool:
        self._label([doc])
        return True

    def _label(self, docs: list[Document]) -> None:
        prose = [doc for doc in docs if doc.metadata.get("media_type") != "text/x-code"]
        home = [doc for doc in prose if doc.metadata.get("language") in (self.config.home_language, None, "")]
        for doc in docs:
            doc.metadata |= {"category": "code", "topic": ""}
        for doc in prose:
            doc.metadata["category"] = "multilingual"
        for doc, is_code, is_reasoning in zip(home, self._judge("code", home), self._judge("reasoning", home), strict=True):
            doc.metadata["category"] = "code" if is_code else "math_and_reasoning" if is_reasoning else "general"
        if "topics" in self._classifiers:
            classifier, _ = self._classifiers["topics"]
            for doc, number in zip(prose, classifier.scores([doc.text for doc in prose]).argmax(axis=1), strict=True):
                doc.metadata["topic"] = classifier.labels[number]

    def _judge(self, name: str, docs: list[Document]) -> list[bool]:
        if name in self._classifiers:
            classifier, number = self._classifiers[name]
            return (classifier.scores([doc.text for doc in docs])[:, number] >= getattr(self.config, name).least).tolist()
        pattern, least = (CODE_LINE, self.config.least_code_lines) if name == "code" else (MATH_LINE, self.config.least_math_lines)
        return [share_of_lines(doc.text, pattern) >= least for doc in docs]

    @functools.cached_property
    def _classifiers(self) -> dict[str, tuple]:
        """Returns, by name, the classifier and the number of its label. Loaded in the process that uses them."""
        found = {}
        for name in ("code", "reasoning"):
            if config := getattr(self.config, name):
                classifier = open_classifier(config.path)
                found[name] = classifier, label_number(classifier.labels, config.label, config.path)
        return found | ({"topics": (open_classifier(self.config.topics), None)} if self.config.topics else {})


def share_of_lines(text: str, pattern: re.Pattern) -> float:
    """Returns which share of the lines that are not blank has a match of `pattern`."""
    lines = [line for line in text[:READ_CHARACTERS].splitlines() if line.strip()]
    return sum(pattern.search(line) is not None for line in lines) / max(1, len(lines))


def topic_rates(counts: Mapping[str, float], caps: Mapping[str, float]) -> dict[str, float]:
    """Returns the probability with which documents of each topic are kept, so that no topic in `caps` has a larger share of the tokens kept.

    `counts`: tokens by topic; `caps`: largest share by topic. Drops as little as possible: topics below their caps are kept whole. Raises
    UserError where the caps cannot be met: every topic that there is has one and they sum to less than 1.
    """
    for topic, cap in caps.items():
        if not 0 < cap <= 1:
            raise UserError(f"the cap of topic '{topic}' is {cap}: it must be more than 0 and at most 1")
    capped: set[str] = set()
    while True:
        free = sum(count for topic, count in counts.items() if topic not in capped)
        kept = free / (1 - sum(caps[topic] for topic in capped))
        over = {topic for topic, count in counts.items() if topic not in capped and count > caps.get(topic, 1) * kept * (1 + 1e-9)}
        if not over:
            break
        capped |= over
    if capped and not free:
        raise UserError("the caps of all topics sum to less than 1, so nothing could be kept: raise one, or leave a topic without a cap")
    return {topic: caps[topic] * kept / count if topic in capped else 1.0 for topic, count in counts.items()}
