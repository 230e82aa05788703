"""Which limits hold for prose in which language (section 3.1.1 of the paper, "multilingual data": heuristics by language)."""

import dataclasses
from typing import Any

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


_LINE_ENDS = "".join(sorted(TERMINAL_PUNCTUATION)) + "\"'”’»」』"


def _european(language: str, stop_words: str) -> Rules:
    """Returns Gopher's rules with the language's own stop words, C4's with its own words about cookies and privacy."""
    return Rules(
        language,
        quality=GopherQualityConfig(min_alphabetic_words=_LEAST_ALPHABETIC, stop_words=tuple(stop_words.split())),
        c4=C4Config(line_ends=_LINE_ENDS, line_phrases=("javascript", *_COOKIES[language])),
    )


# Signs count as words, and more of them stand in other languages: of French Wikipedia 26 % is below Gopher's 0.8, 1.4 % below this.
_LEAST_ALPHABETIC = 0.7
_COOKIES = {  # what a line about privacy or cookies says
    "de": ("datenschutzerklärung", "nutzungsbedingungen", "verwendet cookies", "cookie-richtlinie"),
    "fr": ("politique de confidentialité", "conditions d'utilisation", "utilise des cookies"),
    "es": ("política de privacidad", "términos de uso", "utiliza cookies", "política de cookies"),
    "it": ("informativa sulla privacy", "termini di utilizzo", "utilizza cookie", "utilizza i cookie"),
    "pt": ("política de privacidade", "termos de uso", "utiliza cookies", "política de cookies"),
}


# What follows was measured on the Universal Declaration of Human Rights in 104 of the identifier's languages, and lies where FineWeb-2's
# limits by language lie (Penedo et al. 2025): words of 3.2 characters on average in Urdu, 12.2 in Malayalam, 59 % with letters in Low German.
def _other(language: str, mean_length: tuple[float, float] = (2.0, 12.0), short_line: int = 30, **c4: Any) -> Rules:
    """Returns rules without stop words for a language with spaces, in which the mean word's length lies between these."""
    shortest, longest = mean_length
    return Rules(
        language,
        quality=GopherQualityConfig(
            min_mean_word_length=shortest, max_mean_word_length=longest, min_alphabetic_words=0.6, min_stop_words=None, stop_words=()
        ),
        c4=C4Config(**{"line_ends": _LINE_ENDS} | c4),
        fineweb=FineWebConfig(short_line_length=short_line),
    )


def _other_full_stop(language: str, signs: str, **c4: Any) -> Rules:
    """Returns rules for a language whose full stop is often written with such signs, which do not count as ends of sentences elsewhere."""
    rules = _other(language, line_ends=_LINE_ENDS + signs, min_sentences=None, **c4)
    return dataclasses.replace(rules, fineweb=FineWebConfig(min_terminated_lines=0.0))


def _unspaced(language: str, short_line: int, num_characters: int, has_full_stop: bool) -> Rules:
    """Returns rules for a script without spaces, in which each character is a word.

    Lines are short that say no more than 30 characters of English, `short_line` characters. Of repeated n-grams only those of about five
    words count, `num_characters`. Without a full stop, lines and documents need none.
    """
    return Rules(
        language,
        repetition=RepetitionConfig(top_ngrams=(), duplicate_ngrams=(*[1.0] * (num_characters - 5), 0.15)),
        quality=GopherQualityConfig(
            max_words=None, min_mean_word_length=None, max_mean_word_length=None, min_alphabetic_words=0.6, min_stop_words=None, stop_words=()
        ),
        c4=C4Config(
            line_ends=_LINE_ENDS + "）" if has_full_stop else None,
            min_words_per_line=1,
            max_word_length=None,
            min_sentences=5 if has_full_stop else None,
        ),
        fineweb=FineWebConfig(min_terminated_lines=0.12 if has_full_stop else 0.0, short_line_length=short_line),
    )


RULES: tuple[Rules, ...] = (
    Rules("en", dirty_words=DirtyWordsConfig()),
    _european("de", "der die das und in von zu mit den ist"),
    _european("fr", "le la les de et des que dans un est"),
    _european("es", "el la los de que y en las un con"),
    _european("it", "il la di che e in un per con non"),
    _european("pt", "o a de que e em um com para os"),
    *(_unspaced(language, 8, 10, has_full_stop=True) for language in ("zh", "wuu", "yue")),
    _unspaced("ja", 12, 10, has_full_stop=True),
    *(_unspaced(language, 20, 16, has_full_stop=False) for language in ("th", "lo", "km", "my")),
    *(_unspaced(language, 20, 10, has_full_stop=False) for language in ("bo", "dz")),  # a word is a syllable here
    _other("ko", (1.0, 10.0), short_line=13, min_words_per_line=2),
    *(_other(language, (2.0, 20.0), min_words_per_line=2) for language in ("ml", "ta", "te", "kn")),
    _other_full_stop("hy", ":"),
    _other_full_stop("am", ":፡", min_words_per_line=1),  # spaces or a sign of its own between words
    *(_other_full_stop(language, "|") for language in "as bh bn bpy dty gom gu hi mai mr ne new or pa sa".split()),
    _other(ANY_LANGUAGE),
)
