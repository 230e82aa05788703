"""A model's own chat template (Jinja, as transformers renders it): dialog -> token ids, with the tokens that the assistant wrote.

Special tokens that a message spells must stay text, while those that the template writes are read. So the messages go into the template
with stand-ins for their characters, lone surrogates, which no text has: a special token that shows in the result is the template's. Some
templates look at these characters; then a stand-in takes the place of each special token that a message spells, and of nothing else.

What the assistant wrote begins where the prompt for it ends (the dialog before it, rendered with `add_generation_prompt`) and ends with
its stop token; text is encoded anew where it begins, as it is when a model writes it. Templates that mark it with {% generation %} are
believed.
"""

import dataclasses
import datetime
import functools
import importlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from herd_jax.errors import UserError
from herd_jax.text.messages import TOOL_ROLE, Message, Rendered
from herd_jax.text.protocol import Tokenizer, import_extra

FIRST_STAND_IN = 0xD800
GENERATION_BEGIN, GENERATION_END = "\udffe", "\udfff"

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class StandIns:
    """What stands in for characters, and for whole special tokens, in the messages; those in `trusted` stay as they are where the assistant
    wrote them."""

    characters: Mapping[int, int] = dataclasses.field(default_factory=dict)
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trusted: frozenset[str] = frozenset()

    def hide(self, value: Any, role: str) -> Any:
        """Returns `value`, of a message of `role`, with stand-ins in all its strings."""
        match value:
            case str():
                for name in sorted(self.tokens, key=len, reverse=True):
                    if role != "assistant" or name not in self.trusted:
                        value = value.replace(name, self.tokens[name])
                return value.translate(self.characters)
            case list() | tuple():
                return [self.hide(item, role) for item in value]
            case dict():
                return {self.hide(name, role): self.hide(item, role) for name, item in value.items()}
            case _:
                return value

    def restore(self, text: str) -> str:
        return text.translate({stand_in: character for character, stand_in in self.characters.items()} | {ord(s): name for name, s in self.tokens.items()})


NO_STAND_INS = StandIns()


def render_template(
    messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]], allow_special: bool
) -> Rendered:
    render = functools.partial(_render, tokenizer, messages, list(tools))
    stand_ins = NO_STAND_INS if allow_special else _find_stand_ins(tokenizer, functools.partial(render, add_generation_prompt), _said(messages, tools))
    text, written = _take_marks(render(add_generation_prompt, stand_ins))

    def prefix(generation: bool, num_messages: int) -> str:
        return _take_marks(render(generation, stand_ins, num_messages))[0]

    no_mask = ""
    try:
        written = _check_marks(written, messages) if written else _assistant_spans(text, messages, tokenizer, prefix)
    except UserError as error:
        no_mask = f"the chat template does not show which tokens the assistant wrote, so it cannot be trained on: {error}"
    role_ends = _role_ends(text, messages, functools.partial(prefix, False))
    return Rendered.join(_pieces(text, written, role_ends, tokenizer, stand_ins.restore), no_mask)


def template_text(messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool) -> str:
    """Returns what the template writes, special tokens that a message spells among its own."""
    return _take_marks(_render(tokenizer, messages, [], add_generation_prompt, NO_STAND_INS))[0]


def _pieces(
    text: str, written: Sequence[Span], role_ends: Sequence[tuple[int, str]], tokenizer: Tokenizer, restore: Callable[[str], str]
) -> Iterator[tuple[Sequence[int], str, bool]]:
    """Yields runs of text between special tokens and the ends of `written`, as (ids, role, whether the assistant wrote them)."""
    cuts = [0, *itertools.chain.from_iterable(written), len(text)]
    encode = tokenizer.encode  # of the run: with a space before it, where the tokenizer puts one
    at = 0
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        for j, run in enumerate(tokenizer.split_special(text[start:stop])):
            role = next((role for end, role in role_ends if at < end), role_ends[-1][1])
            at += len(run)
            if j % 2:
                yield [tokenizer.special_ids[run]], role, i % 2 == 1
                encode = tokenizer.encode_continuation if tokenizer.adds_space_once else tokenizer.encode
            elif run:
                yield encode(restore(run)), role, i % 2 == 1
                encode = tokenizer.encode_continuation


def _take_marks(text: str) -> tuple[str, list[Span]]:
    """Returns the text without the marks of {% generation %} blocks, and what stood between them."""
    parts = re.split(f"[{GENERATION_BEGIN}{GENERATION_END}]", text)
    ends = list(itertools.accumulate(map(len, parts)))
    return "".join(parts), list(zip(ends[0:-1:2], ends[1::2], strict=True))


def _check_marks(spans: list[Span], messages: Sequence[Message]) -> list[Span]:
    if len(spans) < sum(message.role == "assistant" for message in messages):
        raise UserError("it marks fewer messages with generation than the assistant wrote")
    return spans


def _assistant_spans(text: str, messages: Sequence[Message], tokenizer: Tokenizer, prefix: Callable[[bool, int], str]) -> list[Span]:
    """Finds what the assistant wrote; `prefix(add_generation_prompt, n)` is the text of the first n messages."""
    spans = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt, through = prefix(True, i), prefix(False, i + 1)
        if not text.startswith(through):
            raise UserError("it writes the beginning of a dialog differently when more follows")
        if not through.startswith(prompt):
            raise UserError("it does not write an answer behind the prompt for it")
        parts = tokenizer.split_special(through[len(prompt) :])
        stops = [j for j in range(1, len(parts), 2) if tokenizer.special_ids[parts[j]] in tokenizer.stop_ids]
        if not stops:
            raise UserError("it ends an assistant's turn with none of the tokenizer's stop tokens")
        spans.append((len(prompt), len(prompt) + sum(map(len, parts[: stops[-1] + 1]))))
    return spans


def _role_ends(text: str, messages: Sequence[Message], prefix: Callable[[int], str]) -> list[tuple[int, str]]:
    """Finds where the text of each role ends. What a template writes on its own counts to the message behind it, a prompt to the assistant."""
    ends = []
    for i, message in enumerate(messages):
        try:
            through = prefix(i + 1)
        except UserError:  # some templates refuse dialogs that end there: this message counts to the next
            continue
        if text.startswith(through):
            ends.append((len(through), message.role))
    return [*ends, (len(text), "assistant")]


def _said(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list:
    return [*(_as_dict(message, NO_STAND_INS) for message in messages), *tools]


def _find_stand_ins(tokenizer: Tokenizer, render: Callable[[StandIns], str], said: Any) -> StandIns:
    """Finds stand-ins for all characters that special tokens consist of, or, where the template looks at the messages, for the marks among them;
    where it looks at these too, for the special tokens that are `said`, as a whole. Where the template looks for one of those (the end of a
    thought), the assistant's own stays.

    Raises UserError where even that changes what the template writes, or where it makes special tokens out of what is said.
    """
    plain = render(NO_STAND_INS)
    # Whitespace is left for templates to trim, quotes for JSON to escape.
    every = {character for name in tokenizer.special_ids for character in name if not (character.isspace() or character in "\"'\\")}
    marks = set().union(*map(_marks, tokenizer.special_ids)) & every
    for characters in (every, marks):
        assert len(characters) < ord(GENERATION_BEGIN) - FIRST_STAND_IN
        stand_ins = StandIns({ord(character): FIRST_STAND_IN + i for i, character in enumerate(sorted(characters))})
        if stand_ins.restore(render(stand_ins)) == plain:
            return stand_ins
    spelled = [name for name in tokenizer.special_ids if StandIns(tokens={name: ""}).hide(said, "") != said]
    tokens = {name: chr(FIRST_STAND_IN + i) for i, name in enumerate(spelled)}
    names = {i: name for name, i in tokenizer.special_ids.items()}
    of_template = {names.get(i) for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)}
    of_template |= {name for name in names.values() if name in tokenizer.chat_template}
    for trusted in (frozenset(), frozenset(spelled) & of_template):
        stand_ins = StandIns(tokens=tokens, trusted=trusted)
        text = render(stand_ins)
        if stand_ins.restore(text) == plain and set(tokenizer.split_special(text)[1::2]) <= of_template:
            return stand_ins
    raise UserError(
        "the chat template changes with the characters of the messages, so special tokens typed in them cannot be told from its own: "
        f"leave {' '.join(sorted(marks))} out of the messages, or allow special tokens in them"
    )


def _marks(special: str) -> set[str]:
    """Returns what a special token cannot be spelled without and a template hardly looks for: marks inside, else its brackets."""
    return {character for character in special[1:-1] if not character.isalnum()} or {special[0], special[-1]}


def _as_dict(message: Message, stand_ins: StandIns) -> dict[str, Any]:
    hide = functools.partial(stand_ins.hide, role=message.role)
    calls = [{"type": "function", "function": {"name": hide(call.name), "arguments": hide(call.arguments)}} for call in message.tool_calls]
    optional = {"tool_calls": calls, "reasoning_content": hide(message.reasoning)}
    role = TOOL_ROLE if message.role == "ipython" else message.role
    return {"role": role, "content": hide(message.content), **{name: value for name, value in optional.items() if value}}


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    stand_ins: StandIns,
    num_messages: int | None = None,
) -> str:
    names = {i: name for name, i in tokenizer.special_ids.items()}
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    template = _compile(tokenizer.chat_template)
    try:
        return template.render(
            messages=[_as_dict(message, stand_ins) for message in messages[:num_messages]],
            tools=stand_ins.hide(tools, "") or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{field: names[i] for field, i in special.items() if i is not None},
        )
    except Exception as error:  # a template is a program of someone else's and can fail in any way
        raise UserError(f"the model's chat template refuses the dialog: {error}") from error


@functools.cache
def _compile(source: str):
    """Returns the Jinja template, with what transformers gives templates to use."""
    jinja2 = import_extra("jinja2", "a chat template")
    extensions, sandbox = importlib.import_module("jinja2.ext"), importlib.import_module("jinja2.sandbox")

    class Generation(extensions.Extension):
        """Reads {% generation %}...{% endgeneration %} around what the assistant wrote."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (
                jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]).set_lineno(line) for mark in (GENERATION_BEGIN, GENERATION_END)
            )
            return [begin, *body, end]

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extensions.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the model's chat template is not valid Jinja ({error}): correct it") from error
