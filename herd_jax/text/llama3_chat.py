"""The dialog format of Llama 3 (section 4.1.1; special tokens and switches as in Meta's reference code and prompt formats of 3.1 and 3.2).

A message is <|start_header_id|>role<|end_header_id|>, two newlines, its content, and <|eot_id|>, or <|eom_id|> where the assistant waits
for a tool. Headers, contents and calls are encoded each on its own, so that text is never read as structure.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from herd_jax.errors import UserError
from herd_jax.text.messages import ROLES, Message, Rendered
from herd_jax.text.protocol import Tokenizer
from herd_jax.text.tool_calls import BUILTIN_TOOLS, describe_tools, read_calls, write_calls

HEADER_START, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
PYTHON_TAG = "<|python_tag|>"
END_TOKENS = {"eot": "<|eot_id|>", "eom": "<|eom_id|>"}
IPYTHON_SWITCH = "Environment: ipython"
MONTHS = "January February March April May June July August September October November December".split()  # whatever the locale


def system_prompt(
    instructions: str = "",
    code_interpreter: bool = False,
    builtin_tools: Sequence[str] = (),
    knowledge_cutoff: str | None = None,
    today: datetime.date | None = None,
) -> str:
    """Returns the content of a system message: the switches that are wanted, then `instructions`.

    `code_interpreter` switches on the code interpreter, `builtin_tools` (of "brave_search", "wolfram_alpha") those and the code
    interpreter with them. `knowledge_cutoff` is what the model was told in training ("December 2023").
    """
    if unknown := [name for name in builtin_tools if name not in BUILTIN_TOOLS]:
        raise UserError(f"builtin_tools has {', '.join(unknown)}: it can have {', '.join(BUILTIN_TOOLS)}; give other tools as tools")
    switches = [IPYTHON_SWITCH] if code_interpreter or builtin_tools else []
    switches += [f"Tools: {', '.join(builtin_tools)}"] if builtin_tools else []
    dates = [f"Cutting Knowledge Date: {knowledge_cutoff}"] if knowledge_cutoff else []
    dates += [f"Today Date: {today:%d} {MONTHS[today.month - 1]} {today:%Y}"] if today else []
    # The released models were trained with an empty line between the switches and the dates where there is no line of tools.
    gap = [""] if switches and dates and not builtin_tools else []
    head = "\n".join((*switches, *gap, *dates))
    return "\n\n".join(part for part in (head, instructions) if part)


def is_llama3(tokenizer: Tokenizer) -> bool:
    """Returns whether answers of the model are in this format: it has the tokens, and its chat template, if any, writes them."""
    has_tokens = all(name in tokenizer.special_ids for name in (HEADER_START, HEADER_END, END_TOKENS["eot"]))
    return has_tokens and (tokenizer.chat_template is None or HEADER_START in tokenizer.chat_template)


def render_llama3(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    add_assistant_header: bool,
    tools: Sequence[Mapping[str, Any]],
    tool_format: str,
    allow_special: bool,
) -> Rendered:
    """Renders as `chat.render`, whose arguments these are."""
    if tools:
        messages = _add_tools(messages, describe_tools(tools, tool_format), tool_format)
    has_ipython = any(message.role == "system" and IPYTHON_SWITCH in message.content.splitlines() for message in messages)

    def pieces() -> Iterator[tuple[Sequence[int], str, bool]]:
        yield [] if tokenizer.bos_id is None else [tokenizer.bos_id], "", False
        for message in messages:
            yield [*_header(message.role, tokenizer), *tokenizer.encode("\n\n")], message.role, False
            content = tokenizer.encode(message.content, allow_special=allow_special)
            is_tagged, calls = write_calls(message.tool_calls, tool_format, has_ipython) if message.tool_calls else (False, "")
            tag = [_special_id(PYTHON_TAG, tokenizer)] if is_tagged else []
            end = END_TOKENS[message.end or ("eom" if is_tagged else "eot")]
            body = [*content, *tag, *tokenizer.encode(calls, allow_special=allow_special), _special_id(end, tokenizer)]
            yield body, message.role, message.role == "assistant"
        if add_assistant_header:
            yield [*_header("assistant", tokenizer), *tokenizer.encode("\n\n")], "assistant", False

    return Rendered.join(pieces())


def parse_llama3(ids: Sequence[int], tokenizer: Tokenizer) -> Message:
    """Returns the message that `ids` begin with; without a header it is the assistant's. Whatever they are, there is one."""
    role, body, has_header = _split_header([i for i in ids if i != tokenizer.bos_id], tokenizer)
    stop = next((at for at, i in enumerate(body) if i in tokenizer.stop_ids), len(body))
    end_ids = {tokenizer.special_ids.get(token): end for end, token in END_TOKENS.items()}
    end = end_ids.get(body[stop]) if stop < len(body) else None
    tag_id = tokenizer.special_ids.get(PYTHON_TAG)
    tag = body.index(tag_id) if role == "assistant" and tag_id in body[:stop] else stop
    content = tokenizer.decode(body[:tag])
    if has_header:
        content = content.removeprefix("\n\n")
    if role != "assistant":
        return Message(role, content, end="eot" if end else None)
    if tag == stop:
        return Message(role, *read_calls(content, is_tagged=False), end)
    _, calls = read_calls(tokenizer.decode(body[tag + 1 : stop]), is_tagged=True)
    return Message(role, content, calls, end)


def _split_header(ids: list[int], tokenizer: Tokenizer) -> tuple[str, list[int], bool]:
    """Returns the role, what is behind the header, and whether there is one."""
    for role in ROLES:
        header = _header(role, tokenizer)
        if ids[: len(header)] == header:
            return role, ids[len(header) :], True
    return "assistant", ids, False


def _add_tools(messages: Sequence[Message], description: str, tool_format: str) -> list[Message]:
    """Tools are described in the first user message, those of the format "python_list" in the system message, as the models expect."""
    role = "system" if tool_format == "python_list" else "user"
    at = next((at for at, message in enumerate(messages) if message.role == role), None)
    if at is None and role == "user":
        raise UserError("tools are described in the first user message and the dialog has none: add one")
    if at is None:
        return [Message("system", description), *messages]
    parts = (messages[at].content, description) if role == "system" else (description, messages[at].content)
    return [*messages[:at], replace(messages[at], content="\n\n".join(filter(None, parts))), *messages[at + 1 :]]


def _header(role: str, tokenizer: Tokenizer) -> list[int]:
    start, end = _special_id(HEADER_START, tokenizer), _special_id(HEADER_END, tokenizer)
    return [start, *tokenizer.encode(role), end]


def _special_id(name: str, tokenizer: Tokenizer) -> int:
    if name not in tokenizer.special_ids:
        raise UserError(f"the tokenizer has no {name}, which this dialog needs: leave tool calls out or take that of Llama 3.1 or later")
    return tokenizer.special_ids[name]
