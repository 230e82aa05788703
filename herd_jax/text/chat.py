"""Dialogs as token ids and back, in the format of the model: that of Llama 3, or the model's own chat template.

What a message says never becomes a special token, whatever it spells, unless `allow_special`.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from herd_jax.errors import UserError
from herd_jax.text.chat_template import render_template, template_text
from herd_jax.text.llama3_chat import is_llama3, parse_llama3, render_llama3, system_prompt
from herd_jax.text.messages import Message, Rendered, ToolCall, check_json, read_dialog
from herd_jax.text.protocol import Tokenizer
from herd_jax.text.tool_calls import TOOL_FORMATS

NO_FORMAT = (
    "the tokenizer has no chat template and is not of Llama 3, so there is no format for dialogs: "
    "take a chat model, or put its chat_template.jinja beside the tokenizer"
)
PROBES = (  # dialogs that show whether a template writes what the format of Llama 3 does
    [Message("user", "one")],
    [Message("system", " be brief\n"), Message("user", "  two "), Message("assistant", "three\n"), Message("user", "")],
    [Message("user", "four"), Message("assistant", "five"), Message("ipython", "six")],
)
__all__ = ["Message", "Rendered", "ToolCall", "parse", "render", "render_text", "system_prompt"]


def render(
    dialog: Iterable[Message | Mapping[str, Any]],
    tokenizer: Tokenizer,
    add_assistant_header: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_format: str = "json",
    allow_special: bool = False,
) -> Rendered:
    """Returns the token ids of `dialog`, with a role and a loss mask.

    `dialog`: Messages, or dicts with role ("system" or "developer", "user", "assistant", "ipython" or "tool"), content (text, or a list of parts
    with text), and where needed tool_calls (list of {"name", "arguments"}), reasoning_content and end. `add_assistant_header` makes it a prompt
    for the assistant's next message. `tools`: the user's own, as dicts with name, description and parameters (a JSON schema). `tool_format` is how Llama 3 describes and calls them:
    "json" and "function_tag" of 3.1, "python_list" of 3.2 1B and 3B; a chat template has its own. `allow_special`: special tokens spelled
    in messages are read as such.

    Raises UserError where the dialog is malformed, its format has no place for what is in it, or the tokenizer is of a model without a
    dialog format.
    """
    messages = read_dialog(dialog)
    check_json(list(tools), "tools")
    if tool_format not in TOOL_FORMATS:
        raise UserError(f"tool_format is {tool_format!r}: it must be one of {', '.join(TOOL_FORMATS)}")
    if _writes_llama3(tokenizer, tokenizer.chat_template):
        return render_llama3(messages, tokenizer, add_assistant_header, tools, tool_format, allow_special)
    if tokenizer.chat_template is not None:
        return render_template(messages, tokenizer, add_assistant_header, tools, allow_special)
    raise UserError(NO_FORMAT)


def render_text(dialog: Iterable[Message | Mapping[str, Any]], tokenizer: Tokenizer, add_assistant_header: bool = False) -> str:
    """Returns the dialog as the text that `render` encodes, special tokens spelled out: for programs that take prompts as text. Those that a
    message spells can no longer be told from its own."""
    if tokenizer.chat_template is not None and not _writes_llama3(tokenizer, tokenizer.chat_template):
        return template_text(read_dialog(dialog), tokenizer, add_assistant_header)
    if not is_llama3(tokenizer):
        raise UserError(NO_FORMAT)
    return _llama3_text(read_dialog(dialog), tokenizer, add_assistant_header)


@functools.lru_cache(maxsize=8)
def _writes_llama3(tokenizer: Tokenizer, template: str | None) -> bool:
    """Returns whether dialogs are rendered in the format of Llama 3: the tokenizer has its tokens, and no template, or one that writes text as
    the format does. The released templates do not: they add a system message with dates, and trim."""
    if not is_llama3(tokenizer) or template is None:
        return is_llama3(tokenizer)
    try:
        return all(_llama3_text(dialog, tokenizer, prompt) == template_text(dialog, tokenizer, prompt) for dialog in PROBES for prompt in (True, False))
    except UserError:
        return False


def _llama3_text(dialog: Sequence[Message], tokenizer: Tokenizer, add_assistant_header: bool) -> str:
    ids = render_llama3(dialog, tokenizer, add_assistant_header, (), "json", False).ids
    names = {i: name for name, i in tokenizer.special_ids.items()}
    runs = itertools.groupby(ids, names.__contains__)
    return "".join("".join(map(names.get, run)) if special else tokenizer.decode(list(run)) for special, run in runs)


def parse(answer: Sequence[int] | str, tokenizer: Tokenizer) -> Message:
    """Returns the message that `answer` begins with: token ids, or text in which special tokens are spelled; with or without a header.

    In the format of Llama 3 tool calls are read; what only resembles one stays text. `end` is None where no end token came. An answer
    in the format of a chat template becomes a message of text.
    """
    if is_llama3(tokenizer):
        return parse_llama3(tokenizer.encode(answer, allow_special=True) if isinstance(answer, str) else answer, tokenizer)
    if isinstance(answer, str):
        parts = tokenizer.split_special(answer)
        stops = [i for i in range(1, len(parts), 2) if tokenizer.special_ids[parts[i]] in tokenizer.stop_ids]
        text = "".join(parts[: stops[0] if stops else None : 2])
    else:
        stops = [at for at, i in enumerate(answer) if i in tokenizer.stop_ids]
        text = tokenizer.decode(answer[: stops[0] if stops else None])
    return Message("assistant", text, end="eot" if stops else None)
