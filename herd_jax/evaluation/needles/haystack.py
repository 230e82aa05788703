"""Needles in a haystack: a prompt of a given number of tokens that hides facts in a long text and asks for one or more of them.

Everything is cut and put together in tokens, so that a prompt has exactly the size asked for and an answer the ids that stand in its needle.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path

import numpy as np

from herd_jax.data.documents import read_documents, work_units
from herd_jax.data.source_files import find_files
from herd_jax.data.streams import TokenStream
from herd_jax.errors import UserError
from herd_jax.text import chat
from herd_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands around and in the haystack. {key} is a needle's name, {keys} those asked for; a value is one word of each of `values`.

    An answer begins with `lead`, which is part of the prompt; the value follows at once. `question` and `lead` are pairs: for one key, and for
    several, None where the template asks for one key at a time only.
    """

    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    intro: str
    needle: str
    question: tuple[str, str | None]
    lead: tuple[str, str | None]


_CITIES = ["Amsterdam", "Athens", "Auckland", "Bangkok", "Barcelona", "Beirut", "Berlin", "Bogota", "Boston", "Budapest", "Cairo", "Chicago", "Dakar", "Delhi", "Dublin", "Geneva", "Hanoi", "Havana", "Helsinki", "Istanbul", "Jakarta", "Kyoto", "Lagos", "Lima", "Lisbon", "London", "Madrid", "Manila", "Melbourne", "Mumbai", "Nairobi", "Oslo", "Paris", "Prague", "Quito", "Rome", "Seoul", "Stockholm", "Sydney", "Vienna"]

# Words that a tokenizer of a small model can be trained to hold whole (benchmarks/make_needles.py).
_NAMES = ["river", "amber", "flint", "cedar", "maple", "ocean", "copper", "silver", "garden", "window", "bridge", "castle", "candle", "forest", "harbor", "island", "jungle", "kettle", "ladder", "meadow", "needle", "orchard", "pepper", "quarry", "ribbon", "saddle", "temple", "tunnel", "valley", "walnut", "yellow", "anchor", "basket", "canyon", "desert", "engine", "falcon", "glacier", "hammer", "indigo", "jacket", "kernel", "lantern", "marble", "napkin", "orange", "parrot", "quiver", "rocket", "sunset", "timber", "umber", "velvet", "willow", "zephyr", "almond", "button", "cactus", "dragon", "ember"]
_THINGS = ["feather", "goblet", "helmet", "ivory", "juniper", "kitten", "lemon", "magnet", "nutmeg", "oyster", "pebble", "quartz", "raven", "salmon", "thistle", "urchin", "violet", "whistle", "yonder", "acorn", "beacon", "cobalt", "dolphin", "eagle", "fiddle", "ginger", "hazel", "insect", "jasmine", "koala", "lotus", "mango", "nectar", "onyx", "panther", "quilt", "rabbit", "shadow", "tulip", "unicorn", "vapor", "wagon", "yogurt", "zebra", "arrow", "barrel", "clover", "daisy", "elbow", "ferry", "gravel", "honey", "igloo", "jewel", "knight", "linen", "mirror", "noodle", "olive", "piano"]

TEMPLATES = {
    # For language models, in a sentence: seven digits.
    "sentence": Template(
        keys=tuple(_CITIES),
        values=(tuple(f" {digit}" for digit in range(1, 10)), *(tuple("0123456789"),) * 6),
        intro="Magic numbers of cities are hidden in the following text. Remember them, they will be asked for.\n\n",
        needle="\nThe magic number of {key} is{value}.\n",
        question=("\n\nWhat is the magic number of {keys} in the text above?\n", "\n\nWhat are the magic numbers of {keys} in the text above?\n"),
        lead=("The magic number of {keys} is", "The magic numbers of {keys} are"),
    ),
    # For the small models of configs/long_context_small.py: a record repeated is the answer, two words.
    "record": Template(
        keys=tuple(_NAMES),
        values=(tuple(f" {word}" for word in _THINGS[:30]), tuple(f" {word}" for word in _THINGS[30:])),  # which is first shows in the words
        intro="",
        needle="\n@ {key}{value}\n",
        question=("", None),
        lead=("\n@ {keys}", None),
    ),
}


@dataclasses.dataclass(frozen=True)
class Needle:
    """A fact that is hidden behind `depth`, in [0, 1], of the haystack."""

    depth: float
    key: str
    value: str


def draw_needles(template: Template, depths: Sequence[float], rng: np.random.Generator) -> list[Needle]:
    """Returns a needle at each depth, with keys that differ."""
    keys = rng.choice(len(template.keys), len(depths), replace=False)
    values = ["".join(words[rng.integers(len(words))] for words in template.values) for _ in depths]
    return [Needle(depth, template.keys[key], value) for depth, key, value in zip(depths, keys, values, strict=True)]


@dataclasses.dataclass(frozen=True)
class PromptMaker:
    """Makes prompts from token ids `haystack` [M], plain text without special tokens. `in_dialog`: as the message of a user, with the
    beginning of the assistant's answer. Raises UserError for an empty haystack, or a model without a format for dialogs asked for one."""

    template: Template
    tokenizer: Tokenizer
    haystack: np.ndarray
    in_dialog: bool = False

    def __post_init__(self):
        if not len(self.haystack):
            raise UserError("the haystack is empty: name files with text in them")

    def prompt(self, needles: Sequence[Needle], asked: Sequence[Needle], size: int, start: int) -> list[int]:
        """Returns exactly `size` ids, up to where the answer begins; the haystack's text is that from its token `start` on, and begins anew at
        its end.

        Raises UserError where `size` has no room for needles and question.
        """
        before, behind = self._frame()
        keys, several = " and ".join(needle.key for needle in asked), len(asked) > 1
        intro = [*before, *self._encode(self.template.intro)]
        question = self._encode(self.template.question[several].format(keys=keys))
        question += [*behind, *self._encode(self.template.lead[several].format(keys=keys))]
        hidden = sorted(((needle.depth, self.needle_ids(needle)) for needle in needles), key=lambda pair: pair[0])
        room = size - len(intro) - len(question) - sum(len(ids) for _, ids in hidden)
        if room < 0:
            raise UserError(
                f"{max(size, 0)} tokens, a length less that of the answer, have no room for the needles and the question, "
                f"which take {size - room}: ask for longer lengths"
            )
        text = self.haystack[(start + np.arange(room)) % len(self.haystack)].tolist()
        ids, last = intro, 0
        for depth, needle_ids in hidden:
            cut = round(depth * room)
            ids += [*text[last:cut], *needle_ids]
            last = cut
        return [*ids, *text[last:], *question]

    def needle_ids(self, needle: Needle) -> list[int]:
        before, behind = self.template.needle.format(key=needle.key, value="\0").split("\0")
        return [*self._encode(before), *self.answer_ids(needle), *self._encode(behind)]

    def answer_ids(self, needle: Needle) -> list[int]:
        return self._encode(needle.value)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_continuation(text) if text else []

    def _frame(self) -> tuple[list[int], list[int]]:
        """Returns the ids before and behind what is said."""
        if not self.in_dialog:
            return ([self.tokenizer.bos_id] if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None else []), []
        dialogs = [chat.render([{"role": "user", "content": text}], self.tokenizer, add_assistant_header=True).ids for text in ("1 2", "word")]
        before, behind = commonprefix([list(ids) for ids in dialogs]), commonprefix([list(ids)[::-1] for ids in dialogs])
        return before, behind[::-1]


def read_haystack(files: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids [M] of all text in files, directories or globs, one document after another; of Python's own manual where none are named.

    Raises UserError where a name matches no file or none has text in it.
    """
    if files:
        pieces = [piece for unit in work_units(find_files(files, leave_out=Path("evaluation"))) for piece in unit]
        texts = [text for piece in pieces for text in read_documents(piece, "text", Counter())]
    else:
        from pydoc_data.topics import topics  # 0.4 MB of prose that every Python has

        texts = [topics[name] for name in sorted(topics)]
    if not texts:
        raise UserError(f"the haystack {', '.join(files)} has no text in it: name other files")
    return np.array(tokenizer.encode_continuation("\n\n".join(texts)), np.int32)


def text_ids(stream: TokenStream, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids [M] of a token stream without its special tokens."""
    ids = stream.read(0, stream.num_tokens)
    return ids[~np.isin(ids, list(tokenizer.special_ids.values()))]
