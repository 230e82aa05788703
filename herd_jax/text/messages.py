"""What a dialog consists of, and what it becomes."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from herd_jax.errors import UserError

ROLES = ("system", "user", "assistant", "ipython")
TOOL_ROLE = "tool"  # what everyone but Llama 3 calls the role "ipython"
ALIASES = {TOOL_ROLE: "ipython", "developer": "system"}
ENDS = ("eot", "eom")
REASONING_FIELDS = ("reasoning_content", "reasoning")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of the tool `name`: a built-in one (`tool_calls.BUILTIN_TOOLS`: {"query": text}), "code_interpreter" ({"code": text}), or the
    user's own."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Message:
    """A message; only the assistant makes tool calls, which stand behind its `content`. The role "ipython" (alias "tool") brings what a
    tool gave.

    `reasoning` is what an assistant thought before its answer; chat templates get it as reasoning_content, and the format of Llama 3 has no place
    for it. `end` says which token ends it: "eot" (end of turn), "eom" (end of message: the assistant goes on when the tool has answered), or
    None: whichever the format asks for. Raises UserError where a field is not what it should be.
    """

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    end: str | None = None
    reasoning: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.role, str):
            object.__setattr__(self, "role", ALIASES.get(self.role, self.role))
        if self.role not in ROLES:
            raise UserError(f"a message has the role {self.role!r}: it must be one of {', '.join((*ROLES, *ALIASES))}")
        if not isinstance(self.content, str):
            raise UserError(f"content of the {self.role} message is of type {type(self.content).__name__}: it must be text")
        if not isinstance(self.reasoning, str):
            raise UserError(f"reasoning of the {self.role} message is of type {type(self.reasoning).__name__}: it must be text")
        if self.role != "assistant" and (self.tool_calls or self.end == "eom"):
            raise UserError(f"a {self.role} message has tool_calls or the end 'eom': only an assistant message has them")
        if self.end not in (None, *ENDS):
            raise UserError(f"end of the {self.role} message is {self.end!r}: it must be one of {', '.join(ENDS)}, or left out")


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A dialog as token ids. `roles` has for each the role of the message that it belongs to, "" where it belongs to none."""

    ids: list[int]
    roles: list[str]
    _loss_mask: list[bool]
    _no_mask: str = ""

    @property
    def loss_mask(self) -> list[bool]:
        """Returns True for the tokens that the assistant wrote, the end of its turns included, headers never. Raises UserError where the chat
        template does not let that be known."""
        if self._no_mask:
            raise UserError(self._no_mask)
        return self._loss_mask

    @classmethod
    def join(cls, pieces: Iterable[tuple[Sequence[int], str, bool]], no_mask: str = "") -> "Rendered":
        """Makes a dialog from pieces of (ids, role, whether the assistant wrote them)."""
        rendered = cls([], [], [], no_mask)
        for ids, role, wrote in pieces:
            rendered.ids.extend(ids)
            rendered.roles.extend([role] * len(ids))
            rendered._loss_mask.extend([wrote] * len(ids))
        return rendered


def read_dialog(dialog: Iterable[Message | Mapping[str, Any]]) -> list[Message]:
    """Makes messages from themselves or from dicts with the same fields, tool calls also in the form that chat servers use ({"type":
    "function", "function": {"name": ..., "arguments": ...}}, arguments as a dict or as JSON text)."""
    messages = [message if isinstance(message, Message) else _read_message(message) for message in dialog]
    if not messages:
        raise UserError("the dialog is empty: give at least one message")
    check_json([[message.content, [[call.name, call.arguments] for call in message.tool_calls]] for message in messages], "the dialog")
    return messages


def check_json(value: Any, what: str) -> None:
    """Raises UserError where `value` is not JSON (NaN is not) or has halves of surrogate pairs in it, which are not text."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} holds what is neither text nor JSON ({error}): correct or drop it") from error


def _read_message(fields: Mapping[str, Any]) -> Message:
    # The dialog formats have no place for what a server needs to match a result with its call.
    known = {"role", "content", "tool_calls", "end", "name", "tool_call_id", *REASONING_FIELDS}
    if not isinstance(fields, Mapping) or "role" not in fields or set(fields) - known:
        raise UserError(f"a message is {fields!r:.200}: it must be a dict with role, content, and where needed tool_calls and end")
    content, reasoning = _read_content(fields.get("content")), next((fields[name] for name in REASONING_FIELDS if fields.get(name)), "")
    calls = tuple(map(_read_call, fields.get("tool_calls") or ()))
    return Message(fields["role"], "" if content is None and (calls or reasoning) else content, calls, fields.get("end"), reasoning)


def _read_content(content: Any) -> Any:
    """Returns the text of content that is a list of parts, as chat servers have it ([{"type": "text", "text": ...}]); else what it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or not str(part.get("type", "text")).endswith("text"):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"content of a message has a part of type {kind!r}: only text is read, so leave it out")
        texts.append(part["text"])
    return "".join(texts)


def _read_call(call: ToolCall | Mapping[str, Any]) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise UserError(f"arguments of the tool call {name!r} are not JSON: give a dict") from error
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"a tool call is {call!r:.200}: it must have a name and a dict of arguments")
    return ToolCall(name, arguments)
