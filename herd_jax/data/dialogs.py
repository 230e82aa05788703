"""Dialogs for fine-tuning: read from JSONL in the forms that are common, and rendered to tokens with the assistant's turns as targets.

A record has "messages" (or "conversations", with "from" and "value"), or a "prompt" and a "completion"; "tools" may stand beside them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from herd_jax.data.packing import Example
from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.text import chat
from herd_jax.text.messages import Message, read_dialog
from herd_jax.text.tokenizer import Tokenizer

SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "ipython", "user": "user", "assistant": "assistant"}
SHOWN = 3  # bad records that a message names


class Problem(NamedTuple):
    """What is wrong with a record."""

    place: str  # FILE:LINE
    reason: str


class Refused(Exception):
    """A record cannot be trained on; its text says why."""


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (FILE:LINE, record) of a JSONL file, or of all *.jsonl of a directory. Raises UserError where there is none, and for a line that is no
    JSON object."""
    given = user_path(path)
    files = sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{path} is no JSONL file, nor a directory with *.jsonl: name one that exists")
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}:{number} is not JSON ({error}): mend or drop the line") from error
                if not isinstance(record, dict):
                    raise UserError(f"{file}:{number} is a {type(record).__name__}: each line must be a JSON object")
                yield f"{file}:{number}", record


def dialog_of(record: Mapping[str, Any]) -> list[Message]:
    """Returns the messages of a record. Raises Refused where it has none."""
    if "messages" in record:
        return _messages(record["messages"])
    if "conversations" in record:
        return _messages([_share_gpt(turn) for turn in record["conversations"]])
    if "prompt" in record and "completion" in record:
        return [*messages_of(record["prompt"], "user"), *messages_of(record["completion"], "assistant")]
    raise Refused("it has none of messages, conversations, or prompt with completion")


def messages_of(value: Any, role: str) -> list[Message]:
    """Returns messages from a list of them, or from text, which is a message of `role`."""
    return [Message(role, value)] if isinstance(value, str) else _messages(value)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise Refused(f"its messages are a {type(value).__name__}, not a list")
    try:
        return read_dialog(value)
    except UserError as error:
        raise Refused(str(error)) from error


def _share_gpt(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or turn.get("from") not in SHARE_GPT_ROLES:
        raise Refused(f"a turn of its conversations is from none of {', '.join(SHARE_GPT_ROLES)}")
    return {"role": SHARE_GPT_ROLES[turn["from"]], "content": turn.get("value", "")}


def check_turns(messages: Sequence[Message]) -> None:
    """Raises Refused for two turns of the assistant in a row, of which no format says where one ends."""
    for before, after in zip(messages, messages[1:]):
        if before.role == after.role == "assistant" and before.end != "eom":
            raise Refused("it has two assistant turns in a row")


def render(record: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Returns the ids of a record's dialog, and which of them the assistant wrote. Raises Refused for what cannot be trained on."""
    messages = dialog_of(record)
    check_turns(messages)
    rendered = chat.render(messages, tokenizer, tools=record.get("tools") or ())
    if not any(rendered.loss_mask[1:]):
        raise Refused("it has no token of the assistant")
    return rendered.ids, rendered.loss_mask


def dialog_example(ids: Sequence[int], mask: Sequence[bool]) -> Example:
    """Returns the example of a dialog: each token predicts the next, and those that the assistant wrote are targets."""
    length = len(ids) - 1
    return {
        "tokens": np.array(ids[:-1], np.int32),
        "targets": np.array(ids[1:], np.int32),
        "loss_mask": np.array(mask[1:], bool),
        "segment_ids": np.ones(length, np.int32),
        "positions": np.arange(length, dtype=np.int32),
    }


def read_dialogs(path: str | Path, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Example], list[Problem]]:
    """Returns the examples of a source, and what is wrong with the records that are none. A dialog longer than `seq_len` is left out, for cut it
    would teach not to end."""
    return make_examples(path, lambda record: [dialog_example(*render(record, tokenizer))], seq_len)


def make_examples(path: str | Path, make, seq_len: int) -> tuple[list[Example], list[Problem]]:
    """Returns the examples that `make(record) -> examples` makes of each record, and the problems of those that it refuses."""
    examples, problems = [], []
    for place, record in read_records(path):
        try:
            made = make(record)
            for example in made:
                if len(example["tokens"]) > seq_len:
                    raise Refused(f"it takes {len(example['tokens'])} tokens and train.seq_len is {seq_len}")
        except Refused as reason:
            problems.append(Problem(place, str(reason)))
        else:
            examples += made
    return examples, problems


def check_problems(path: str | Path, num_examples: int, problems: Sequence[Problem], most: float) -> str:
    """Returns a line about the records that were left out, "" where none was. Raises UserError where they are more than the share `most`, or all."""
    if not problems and num_examples:
        return ""
    total = num_examples + len(problems)
    shown = "; ".join(f"{problem.place}: {problem.reason}" for problem in problems[:SHOWN]) or "it is empty"
    if not num_examples or len(problems) > most * total:
        raise UserError(
            f"{len(problems)} of {total} records of {path} cannot be trained on ({shown}): mend or drop them, or raise examples.most_bad, now {most:g}"
        )
    return f"{path}: left out {len(problems)} of {total} records ({shown})"
