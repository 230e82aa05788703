"""Which limits hold for prose in which language (section 3.1.1 of the paper, "multilingual data": heuristics by language)."""

import dataclasses

from datatrove.utils.text import TERMINAL_PUNCTUATION

from herd_jax.curation.heuristics.c4 import C4Config, C4Quality
from herd_jax.curation.heuristics.dirty_words import DirtyWords, DirtyWordsConfig
from herd_jax.curation.heuristics.fineweb import FineWebConfig, FineWebQuality
from herd_jax.curation.heuristics.gopher import GopherQuality, GopherQualityConfig
from herd_jax.curation.heuristics.prose import ANY_LANGUAGE, ProseBlock
from herd_jax.curation.heuristics.repetition import Repetition, RepetitionConfig
from herd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rules:
    """Settings of the heuristic blocks for one `language` (ISO 639-1, or "*" for all without rules of their own); None: not judged."""

    language: str = ANY_LANGUAGE
    repetition: RepetitionConfig | None = RepetitionConfig()
    quality: GopherQualityConfig | None = GopherQualityConfig()
    c4: C4Config | None = C4Config()
    fineweb: FineWebConfig | None = FineWebConfig()
    dirty_words: DirtyWordsConfig | None = None

    def __post_init__(self):
        if not self.language:
            raise UserError(f"curation rules.language is empty: give a code such as 'en', or '{ANY_LANGUAGE}' for all other languages")


BLOCKS = {"repetition": Repetition, "quality": GopherQuality, "c4": C4Quality, "fineweb": FineWebQuality, "dirty_words": DirtyWords}


def prose_blocks(rules: tuple[Rules, ...]) -> list[ProseBlock]:
    """Returns the block of each field of `Rules`, in the order in which they judge. Raises UserError where no rules are for "*"."""
    return [block({rule.language: getattr(rule, field) for rule in rules}) for field, block in BLOCKS.items()]


# Signs count as words, and more of them stand in other languages: of French Wikipedia 26 % is below Gopher's 0.8, 1.4 % below this.
_LEAST_ALPHABETIC = 0.7
_LINE_ENDS = "".join(sorted(TERMINAL_PUNCTUATION)) + "\"'”’»」』"


def _european(language: str, stop_words: str) -> Rules:
    """Returns Gopher's rules with the language's own stop words, C4's with its own words about cookies and privacy."""
    return Rules(
        language,
        quality=GopherQualityConfig(min_alphabetic_words=_LEAST_ALPHABETIC, stop_words=tuple(stop_words.split())),
        c4=C4Config(line_ends=_LINE_ENDS, line_phrases=("javascript", *_COOKIES[language])),
    )


def _unspaced(language: str) -> Rules:
    """In scripts without spaces each character is a word: limits on the length of words say nothing, and of n-grams only long ones do; ten
    characters are about five words."""
    return Rules(
        language,
        repetition=RepetitionConfig(top_ngrams=(), duplicate_ngrams=(1.0, 1.0, 1.0, 1.0, 1.0, 0.15)),
        quality=GopherQualityConfig(
            max_words=None, min_mean_word_length=None, min_alphabetic_words=0.6, min_stop_words=None, stop_words=()
        ),
        c4=C4Config(line_ends=_LINE_ENDS, min_words_per_line=1, max_word_length=None),
    )


_COOKIES = {  # what a line about privacy or cookies says
    "de": ("datenschutzerklärung", "nutzungsbedingungen", "verwendet cookies", "cookie-richtlinie"),
    "fr": ("politique de confidentialité", "conditions d'utilisation", "utilise des cookies"),
    "es": ("política de privacidad", "términos de uso", "utiliza cookies", "política de cookies"),
    "it": ("informativa sulla privacy", "termini di utilizzo", "utilizza cookie", "utilizza i cookie"),
    "pt": ("política de privacidade", "termos de uso", "utiliza cookies", "política de cookies"),
}

RULES: tuple[Rules, ...] = (
    Rules("en", dirty_words=DirtyWordsConfig()),
    _european("de", "der die das und in von zu mit den ist"),
    _european("fr", "le la les de et des que dans un est"),
    _european("es", "el la los de que y en las un con"),
    _european("it", "il la di che e in un per con non"),
    _european("pt", "o a de que e em um com para os"),
    *map(_unspaced, ("zh", "ja", "th", "lo", "km", "my")),
    Rules(ANY_LANGUAGE, quality=GopherQualityConfig(min_alphabetic_words=_LEAST_ALPHABETIC, min_stop_words=None, stop_words=()), c4=C4Config(line_ends=_LINE_ENDS)),
)
