"""Personal data is masked, and a text full of it goes (section 3.1.1 of the paper, PII and safety filtering)."""

import dataclasses

from datatrove.data import Document

from herd_jax.curation.block import Block
from herd_jax.curation.safety.personal_data import CODE_KINDS, KINDS, find
from herd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PiiConfig:
    """`kinds` are looked for and replaced by `replacement`, in which {kind} stands for the kind in capitals: <EMAIL>.

    A text with at least `min_count` of them and more than `max_per_thousand_characters` goes: a list of contacts, not prose.
    """

    kinds: tuple[str, ...] = KINDS  # what is looked for
    replacement: str = "<{kind}>"  # what stands in its place; {kind} is the kind in capitals
    min_count: int = 10  # found from which on a text may go as a list of contacts
    max_per_thousand_characters: float = 5.0  # above which it then goes

    def __post_init__(self):
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"curation pii.kinds names '{kind}': it may name {', '.join(KINDS)}")
        if self.min_count < 1:
            raise UserError(f"curation pii.min_count is {self.min_count}: it must be 1 or more")
        if not self.max_per_thousand_characters >= 0:
            raise UserError(f"curation pii.max_per_thousand_characters is {self.max_per_thousand_characters}: it must be 0 or more")


class Pii(Block):
    """Masks personal data in the text, or drops the document for "much_personal_data". Of source code only `CODE_KINDS` are masked.

    Memory: a second copy of the text, and some 200 bytes for each thing found.
    """

    name = "pii"

    def __init__(self, config: PiiConfig):
        super().__init__()
        self._config = config

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        config, text = self._config, doc.text
        is_code = doc.metadata["media_type"] == "text/x-code"
        found = find(text, tuple(kind for kind in config.kinds if kind in CODE_KINDS or not is_code))
        if len(found) >= config.min_count and 1000 * len(found) > config.max_per_thousand_characters * len(text):
            return False, "much_personal_data"
        pieces, end = [], 0
        for start, stop, kind in found:
            pieces += [text[end:start], config.replacement.replace("{kind}", kind.upper())]
            end = stop
        doc.text = "".join([*pieces, text[end:]])
        return True
