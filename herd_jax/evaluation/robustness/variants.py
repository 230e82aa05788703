"""The ways in which multiple choice is posed to see whether the answers change with them (section 5.1.1 of the paper).

Four studies: how the labels of the examples are distributed, which labels there are, in what order the choices stand, and what the prompt
says. A study changes one thing and leaves all else alone: the examples, too, are the same in all its variants.
"""

import dataclasses
import itertools
import random
from collections.abc import Sequence

from herd_jax.errors import UserError
from herd_jax.evaluation.benchmarks.multiple_choice import LETTERS, Item, prompt

NUM_CHOICES = 4
NUM_SHOTS = 5  # the paper's of MMLU
IN_PLACE = tuple(range(NUM_CHOICES))
SHOT_PLACES = ((0, 1, 2, 3), (0, 0, 0, 0), (0, 0, 1, 1), (2, 2, 3, 3))  # of the right answers of four examples
INSTRUCTION = "The following are multiple choice questions (with answers){about}."

# One of the paper's prompts just asks for an answer, others claim expertise or ask for the best answer; the words are ours.
INSTRUCTIONS = {
    "header": INSTRUCTION,
    "ask": "Answer the question.",
    "best": "Choose the best answer to each question.",
    "expert": "You are an expert{about} and answer multiple choice questions correctly.",
    "expert, best": "You are an expert{about}. Read each question and all of its choices with care, then give the best answer.",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """How items are posed. Choice i stands at place `order[i]`, there labelled `labels[order[i]]`; `form` is how a line shows its label.
    `shot_places` are those of the right answers of the examples, as many as there are; None: NUM_SHOTS examples, as they are."""

    name: str
    labels: tuple[str, ...] = LETTERS[:NUM_CHOICES]
    form: str = "{label}. {choice}"
    order: tuple[int, ...] = IN_PLACE
    shot_places: tuple[int, ...] | None = None
    instruction: str = INSTRUCTION

    def prompt(self, item: Item, shots: Sequence[Item]) -> str:
        """Returns what " " and a label follow; `shots` are NUM_SHOTS examples."""
        if self.shot_places:
            shots = [answer_at(shot, place) for shot, place in zip(shots, self.shot_places)]
        about = f" about {item.subject.replace('_', ' ')}" if item.subject else ""
        shown = [reorder(shot, self.order) for shot in shots]
        return prompt(reorder(item, self.order), shown, self.labels, self.form, self.instruction.format(about=about))


def studies() -> dict[str, list[Variant]]:
    """Returns the variants of each study; with the first of a study the others are compared."""
    orders = sorted(itertools.permutations(IN_PLACE), key=distance)
    return {
        "few-shot labels": [Variant(letters(places), shot_places=places) for places in SHOT_PLACES],
        "label sets": [
            Variant("A. B. C. D."),
            Variant("A) B) C) D)", form="{label}) {choice}"),
            Variant("1. 2. 3. 4.", labels=("1", "2", "3", "4")),
            Variant("$ & # @", labels=("$", "&", "#", "@")),
            Variant("œ § з ü", labels=("œ", "§", "з", "ü")),
        ],
        "answer order": [Variant(letters(order), order=order) for order in orders],
        "prompts": [Variant(name, instruction=instruction) for name, instruction in INSTRUCTIONS.items()],
    }


def distance(order: Sequence[int]) -> int:
    """Returns how many choices an order moves: 0, 2, 3 or 4."""
    return sum(place != i for i, place in enumerate(order))


def reorder(item: Item, order: Sequence[int]) -> Item:
    """Returns the item with choice i at place `order[i]`; it keeps its id."""
    shown = sorted(range(len(order)), key=order.__getitem__)
    return dataclasses.replace(item, choices=tuple(item.choices[i] for i in shown), answer=order[item.answer])


def answer_at(item: Item, place: int) -> Item:
    """Returns the item with its right answer at `place`, and what stood there where the answer was."""
    order = list(IN_PLACE)
    order[item.answer], order[place] = place, item.answer
    return reorder(item, order)


def draw_shots(task: str, items: Sequence[Item], seed: int) -> tuple[dict[str, list[Item]], list[Item]]:
    """Draws the examples of each subject; returns them and the items that are left to be asked. The same seed draws the same.

    Raises UserError where there are too few items.
    """
    shots = {}
    for subject in {item.subject: None for item in items} or ("",):
        among = [item for item in items if item.subject == subject]
        if len(among) <= NUM_SHOTS:
            about = f" about {subject}" if subject else ""
            raise UserError(
                f"{task} has {len(among)} items of {NUM_CHOICES} choices{about}: give {NUM_SHOTS + 1} or more, {NUM_SHOTS} become examples"
            )
        shots[subject] = random.Random(f"{seed} {subject}").sample(among, NUM_SHOTS)
    drawn = {shot.id for of_subject in shots.values() for shot in of_subject}
    return shots, [item for item in items if item.id not in drawn]


def letters(places: Sequence[int]) -> str:
    return "".join(LETTERS[place] for place in places)
