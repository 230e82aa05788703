"""Preferences between responses to a prompt: read from JSONL, and laid out in rows for the reward model and for DPO (sections 4.1.2, 4.1.4, 4.2.1).

A record has "chosen" and "rejected", and may have "edited", which is better than both: texts, or messages of the assistant after the messages of
"prompt" (a text is one of the user's); without "prompt" both begin with the same messages. "level" says how much better the chosen one is.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from herd_jax.data.dialogs import Refused, messages_of
from herd_jax.data.packing import Example
from herd_jax.errors import UserError
from herd_jax.text import chat
from herd_jax.text.messages import Message
from herd_jax.text.tokenizer import Tokenizer

LEVELS = ("significantly better", "better", "slightly better", "marginally better")
TRAINED_LEVELS = LEVELS[:2]  # similar responses teach little (section 4.2.1)
REJECTED, CHOSEN, EDITED = 1, 2, 3
NAMES = {"edited": EDITED, "chosen": CHOSEN, "rejected": REJECTED}


class Response(NamedTuple):
    """A response as what follows the prompt's ids. `mask`: whether the assistant wrote a token, the end of its turn included."""

    ids: list[int]
    mask: list[bool]
    rank: int


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt and its responses, the best first. Its `key` is the same for the same ids and masks."""

    prompt: list[int]
    responses: tuple[Response, ...]

    @property
    def key(self) -> bytes:
        return hashlib.sha256(repr((self.prompt, self.responses)).encode()).digest()

    @property
    def pair(self) -> "Preference":
        """Returns the best response and the worst alone."""
        return Preference(self.prompt, (self.responses[0], self.responses[-1]))


def read_preference(record: Mapping[str, Any], tokenizer: Tokenizer) -> Preference | None:
    """Returns the preference of a record; None where its level is not trained on. Raises Refused for what cannot be."""
    level = record.get("level", LEVELS[0])
    if level not in LEVELS:
        raise Refused(f"its level is {level!r}, which is none of {', '.join(LEVELS)}")
    for name in ("chosen", "rejected"):
        if not record.get(name):
            raise Refused(f"its {name} response is empty or missing")
    if level not in TRAINED_LEVELS:
        return None
    prompt, answers = _split(record)
    if any(first == second for i, first in enumerate(answers.values()) for second in list(answers.values())[i + 1 :]):
        raise Refused("two of its responses are equal")
    try:
        prompt_ids = chat.render(prompt, tokenizer, add_assistant_header=True, tools=record.get("tools") or ()).ids
        responses = [_respond(prompt, prompt_ids, answer, NAMES[name], record, tokenizer) for name, answer in answers.items()]
    except UserError as error:
        raise Refused(str(error)) from error
    return Preference(prompt_ids, tuple(sorted(responses, key=lambda response: -response.rank)))


def _split(record: Mapping[str, Any]) -> tuple[list[Message], dict[str, list[Message]]]:
    """Returns the messages of the prompt, and those of each response by name."""
    answers = {name: messages_of(record[name], "assistant") for name in NAMES if record.get(name)}
    if "prompt" in record:
        prompt = messages_of(record["prompt"], "user")
    else:
        shortest = min(map(len, answers.values()))
        same = [all(answer[i] == answers["chosen"][i] for answer in answers.values()) for i in range(shortest)]
        length = min(same.index(False) if False in same else shortest, shortest - 1)
        prompt, answers = answers["chosen"][:length], {name: answer[length:] for name, answer in answers.items()}
    if not prompt or prompt[-1].role == "assistant":
        raise Refused("its prompt has no message, or ends with one of the assistant's")
    for name, answer in answers.items():
        if not any(message.role == "assistant" and (message.content or message.tool_calls) for message in answer):
            raise Refused(f"its {name} response is empty")
        if answer[0].role != "assistant":
            raise Refused(f"its {name} response does not begin with a message of the assistant")
    return prompt, answers


def _respond(prompt, prompt_ids, answer, rank: int, record, tokenizer: Tokenizer) -> Response:
    whole = chat.render([*prompt, *answer], tokenizer, tools=record.get("tools") or ())
    if whole.ids[: len(prompt_ids)] != prompt_ids:
        raise Refused("the chat template writes its prompt in another way when an answer follows, so the answer cannot be told from it")
    mask = whole.loss_mask[len(prompt_ids) :]
    if not any(mask):
        raise Refused("a response has no token of the assistant")
    return Response(whole.ids[len(prompt_ids) :], mask, rank)


def preference_example(preference: Preference, order: Sequence[int], share_prompt: bool, unscored: Sequence[int]) -> Example:
    """Returns the example of a preference, its responses placed in `order`.

    With `share_prompt` the prompt stands there once, without its last token, and each response behind it begins with a copy of that token, so that
    every target is predicted within its own branch; else each response has a prompt of its own. `unscored`: ids that do not count in a preference,
    such as those that end a turn. `response_ids` number the responses from the best, wherever they stand; all fields are those that
    `training.objectives.preference` and `ranking` read.
    """
    prompt, parts = preference.prompt, []
    trunk = prompt[:-1] if share_prompt else []
    if trunk:
        parts.append(_part(trunk, [0] * len(trunk), 0, segment=1, branch=0))
    for place, number in enumerate(order):
        response = preference.responses[number]
        before = prompt[len(trunk) :]
        tokens, nothing = [*before, *response.ids], [0] * (len(before) - 1)
        part = _part(tokens, [*nothing, *response.ids, 0], len(trunk), segment=1 if share_prompt else place + 1, branch=place + 1 if share_prompt else 0)
        written = np.array([*[False] * len(nothing), *response.mask, False])
        part["response_ids"][:] = number + 1
        part["loss_mask"][:] = written if number == 0 else False
        part["scored"][:] = written & ~np.isin(part["targets"], list(unscored))
        part["levels"][len(before) + max(i for i, wrote in enumerate(response.mask) if wrote)] = response.rank
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _part(tokens: Sequence[int], targets: Sequence[int], first_position: int, segment: int, branch: int) -> dict[str, np.ndarray]:
    length = len(tokens)
    whole = lambda value, dtype=np.int32: np.full(length, value, dtype)
    return {
        "tokens": np.array(tokens, np.int32), "targets": np.array(targets, np.int32), "positions": np.arange(first_position, first_position + length, dtype=np.int32),
        "segment_ids": whole(segment), "branch_ids": whole(branch), "prompt_ids": whole(1), "response_ids": whole(0), "levels": whole(0),
        "loss_mask": whole(False, bool), "scored": whole(False, bool),
    }  # fmt: skip
