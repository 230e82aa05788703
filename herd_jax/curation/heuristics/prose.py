"""Blocks that judge prose by rules which its language chooses."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from datatrove.data import Document

from herd_jax.curation.block import Block
from herd_jax.errors import UserError

CODE = "text/x-code"
ANY_LANGUAGE = "*"


class ProseBlock(Block):
    """A block with settings for each language, those of "*" for all without settings of their own. Subclasses say in `judge` what `filter` is
    to say of prose by one language's settings.

    Source code is kept unseen, and so is prose in a language whose settings are None.
    """

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self._settings = dict(settings)
        if ANY_LANGUAGE not in self._settings:
            raise UserError(f"curation rules name no language '{ANY_LANGUAGE}': add an entry for the languages that have none of their own")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if doc.metadata["media_type"] == CODE:
            return True
        settings = self._settings.get(doc.metadata["language"], self._settings[ANY_LANGUAGE])
        return True if settings is None else self.judge(doc, settings)

    @abstractmethod
    def judge(self, doc: Document, settings: Any) -> bool | tuple[bool, str]: ...


def check_fractions(section: str, fractions: dict[str, float | None]) -> None:
    """Raises UserError where a limit that is not None lies outside 0 to 1."""
    for key, value in fractions.items():
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"curation {section}.{key} is {value}: give a fraction from 0 to 1, or none to switch the rule off")


def check_counts(section: str, counts: dict[str, float | None]) -> None:
    """Raises UserError where a limit that is not None is negative."""
    for key, value in counts.items():
        if value is not None and value < 0:
            raise UserError(f"curation {section}.{key} is {value}: give 0 or more, or none to switch the rule off")
