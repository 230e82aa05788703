"""Lists and menus: FineWeb's rules about lines (Penedo et al. 2024, section 3.6)."""

import dataclasses

from datatrove.data import Document
from datatrove.utils.text import TERMINAL_PUNCTUATION

from herd_jax.curation.heuristics.prose import ProseBlock, check_counts, check_fractions
from herd_jax.curation.heuristics.repetition import duplicates
from herd_jax.curation.text import words


@dataclasses.dataclass(frozen=True)
class FineWebConfig:
    """Fractions of the lines that must end with a terminal sign of any script, and that may be short (characters at most); fraction of the
    characters that may be in copies of lines; line ends that there may be for each word."""

    min_terminated_lines: float = 0.12
    max_short_lines: float = 0.67
    short_line_length: int = 30
    max_duplicate_characters: float = 0.01
    max_lines_per_word: float = 0.3

    def __post_init__(self):
        fractions = ("min_terminated_lines", "max_short_lines", "max_duplicate_characters")
        check_fractions("fineweb", {name: getattr(self, name) for name in fractions})
        check_counts("fineweb", {name: getattr(self, name) for name in ("short_line_length", "max_lines_per_word")})


class FineWebQuality(ProseBlock):
    """Verdicts, reasons and their order are those of datatrove's FineWebQualityFilter."""

    name = "fineweb_quality"

    def judge(self, doc: Document, settings: FineWebConfig) -> bool | tuple[bool, str]:
        lines = [line for line in doc.text.split("\n") if line.strip()]
        if not lines:
            return False, "empty"
        if sum(line[-1] in TERMINAL_PUNCTUATION for line in lines) / len(lines) < settings.min_terminated_lines:
            return False, "line_punct_ratio"
        if sum(len(line) <= settings.short_line_length for line in lines) / len(lines) > settings.max_short_lines:
            return False, "short_line_ratio"
        num_line_ends = doc.text.count("\n")
        if duplicates(lines)[1] / (len(doc.text) - num_line_ends) > settings.max_duplicate_characters:
            return False, "char_dup_ratio"
        if num_line_ends / len(words.split(doc.text)) > settings.max_lines_per_word:
            return False, "list_ratio"
        return True
