"""Lines that are no sentences, pages that are no text: C4's rules (Raffel et al. 2020, section 2.2), line removal among them."""

import dataclasses
import re

import numpy as np
from datatrove.data import Document

from herd_jax.curation.heuristics.prose import ProseBlock, check_counts
from herd_jax.curation.text import words
from herd_jax.curation.text.characters import ENDS_SENTENCE, NOT_PUNCTUATION
from herd_jax.errors import UserError

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")


@dataclasses.dataclass(frozen=True)
class C4Config:
    """A line stays if it ends with a character of `line_ends` but not "...", has `min_words_per_line` words or more, none of more than
    `max_word_length` characters, and none of `line_phrases`; a document if `min_sentences` are left, and no `{` or `page_phrases` in them.

    Phrases are in lower case. None: no limit.
    """

    line_ends: str | None = ".?!\"'"
    min_words_per_line: int = 3
    max_word_length: int | None = 1000
    min_sentences: int | None = 5
    line_phrases: tuple[str, ...] = (
        "javascript",
        "terms of use",
        "privacy policy",
        "cookie policy",
        "uses cookies",
        "use of cookies",
        "use cookies",
    )
    page_phrases: tuple[str, ...] = ("lorem ipsum",)
    drop_curly_brackets: bool = True

    def __post_init__(self):
        if self.line_ends is not None and not self.line_ends:
            raise UserError("curation c4.line_ends is empty and no line could stay: give the signs that may end one, or none for any sign")
        check_counts("c4", {name: getattr(self, name) for name in ("min_words_per_line", "max_word_length", "min_sentences")})


class C4Quality(ProseBlock):
    """Removes lines, and citations like [3] from those that stay. Verdicts and reasons are those of datatrove's C4QualityFilter,
    but for a line about privacy or cookies with a curly bracket in it: here the line goes, there the document."""

    name = "c4_quality"

    def judge(self, doc: Document, settings: C4Config) -> bool | tuple[bool, str]:
        lowered = doc.text.lower()
        line_phrases = [phrase for phrase in settings.line_phrases if phrase in lowered]
        page_phrases = [phrase for phrase in settings.page_phrases if phrase in lowered]
        has_citations = "[" in doc.text
        has_curly = settings.drop_curly_brackets and "{" in doc.text
        ends = "" if settings.line_ends is None else tuple(settings.line_ends)  # each line ends with ""
        kept = []
        for line in doc.text.splitlines():
            line = line.strip()
            if not line:
                continue
            if settings.max_word_length is not None and _has_longer_word(line, settings.max_word_length):
                continue
            num_words = len(line.split(None, settings.min_words_per_line))
            if has_citations:
                line = _CITATION.sub("", line)
            if not line.endswith(ends) or line.endswith("...") or num_words < settings.min_words_per_line:
                continue
            lowered_line = line.lower() if page_phrases or line_phrases else ""
            if any(phrase in lowered_line for phrase in page_phrases):
                return False, "lorem_ipsum"
            if any(phrase in lowered_line for phrase in line_phrases):
                continue
            if has_curly and "{" in line:
                return False, "curly_bracket"
            kept.append(line)
        text = "\n".join(kept)
        if settings.min_sentences is not None and not _has_sentences(text, kept, settings.min_sentences):
            return False, "too_few_sentences"
        doc.text = text.strip()
        return True


def _has_longer_word(line: str, limit: int) -> bool:
    return len(line) > limit and any(len(word) > limit for word in line.split())


def _has_sentences(text: str, lines: list[str], minimum: int) -> bool:
    """Returns whether the lines, joined in `text`, hold so many sentences; each line begins one."""
    return len(lines) >= minimum or num_sentences(text, lines) >= minimum


def num_sentences(text: str, lines: list[str]) -> int:
    """Counts the sentences of the lines that `text` joins: a line's first word begins one, and so does a word behind a sign that ends one."""
    found = words.split(text)
    ends = ((found.kinds & ENDS_SENTENCE) != 0) & (found.lengths == 1)
    begins = ((found.kinds & NOT_PUNCTUATION) != 0) & ~ends
    counted = (ends | begins).nonzero()[0]
    line_starts = np.cumsum([0] + [len(line) + 1 for line in lines[:-1]])
    line = line_starts.searchsorted(found.starts[counted], side="right")
    return len(lines) + int(np.count_nonzero(ends[counted[:-1]] & begins[counted[1:]] & (line[1:] == line[:-1])))
