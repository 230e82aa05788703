"""The dialog format of Llama 3 in both directions: ids, roles, loss masks, tool calls; what a message says never becomes structure."""

import datetime
import keyword
import re

import pytest
import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_jax.errors import UserError
from herd_jax.text.chat import Message, ToolCall, parse, render, render_text, system_prompt
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer

SEARCH = ToolCall("brave_search", {"query": 'the "best"\n\\alpha price?'})
CODE = ToolCall("code_interpreter", {"code": "print('<|eom_id|>')\nx = [f(a=1)]\n"})
SONGS = ToolCall("trending_songs", {"n": 10, "genre": 'größte "Hits"\n', "deep": {"a": True, "b": None, "c": 1.5}})
TOOL = {"name": "trending_songs", "description": "Songs of the day <|eot_id|>", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizers.make_llama3(tmp_path_factory.mktemp("tokenizer"))


def spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer._encoding.decode(ids)


def test_a_dialog_as_text_is_what_its_ids_spell(small):
    dialog = [{"role": "system", "content": "größte\n\n"}, {"role": "user", "content": " u "}]
    assert render_text(dialog, small, add_assistant_header=True) == spelled(render(dialog, small, add_assistant_header=True).ids, small)


def test_roles_and_loss_mask(small):
    dialog = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "find", "tool_calls": [{"name": "brave_search", "arguments": {"query": "q"}}]},
        {"role": "tool", "content": "r"},
        Message("assistant", "done"),
    ]
    rendered = render(dialog, small, add_assistant_header=True)

    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    call = '<|python_tag|>brave_search.call(query="q")<|eom_id|>'
    parts = [
        ("<|begin_of_text|>", "", False),
        (f"{header('system')}s<|eot_id|>", "system", False),
        (f"{header('user')}u<|eot_id|>", "user", False),
        (header("assistant"), "assistant", False),
        (f"find{call}", "assistant", True),
        (f"{header('ipython')}r<|eot_id|>", "ipython", False),
        (header("assistant"), "assistant", False),
        ("done<|eot_id|>", "assistant", True),
        (header("assistant"), "assistant", False),
    ]
    lengths = [len(small.encode(text, allow_special=True)) for text, _, _ in parts]
    assert rendered.ids == small.encode("".join(text for text, _, _ in parts), allow_special=True)
    assert rendered.roles == [role for (_, role, _), length in zip(parts, lengths, strict=True) for _ in range(length)]
    assert rendered.loss_mask == [wrote for (_, _, wrote), length in zip(parts, lengths, strict=True) for _ in range(length)]


def test_spelled_special_tokens_stay_text(small):
    name = "".join(small.special_ids)
    calls = (ToolCall(name, {name: name}),)
    dialog = [Message(role, name) for role in ("system", "user", "ipython")] + [Message("assistant", name, calls)]
    plain = render([Message(m.role, "x", (ToolCall("f", {"x": "x"}),) if m.tool_calls else ()) for m in dialog], small)
    special = set(small.special_ids.values())
    assert [i for i in render(dialog, small).ids if i in special] == [i for i in plain.ids if i in special]
    tooled = render(dialog, small, tools=[{**TOOL, "description": name}])
    assert [i for i in tooled.ids if i in special] == [i for i in plain.ids if i in special]
    assert small.special_ids["<|image|>"] in render([Message("user", "<|image|>")], small, allow_special=True).ids


@pytest.mark.parametrize(
    "call,system,tool_format,text",
    [
        (SEARCH, "", "json", '<|python_tag|>brave_search.call(query="the "best"\n\\alpha price?")<|eom_id|>'),
        (CODE, "", "python_list", "<|python_tag|>print('<|eom_id|>')\nx = [f(a=1)]\n<|eom_id|>"),
        (ToolCall("f", {"a": 1}), "", "json", '{"type": "function", "name": "f", "parameters": {"a": 1}}<|eot_id|>'),
        (
            ToolCall("f", {"a": 1}),
            "x\nEnvironment: ipython\ny",
            "json",
            '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}<|eom_id|>',
        ),
        (ToolCall("f", {"a": 1}), "Environment: ipython", "function_tag", '<function=f>{"a": 1}</function><|eot_id|>'),
        (ToolCall("f", {"a": 'x"y', "b": [None, {"c": 1.5}]}), "", "python_list", '[f(a="x\\"y", b=[None, {"c": 1.5}])]<|eot_id|>'),
        (ToolCall("brave_search", {"count": 2}), "", "function_tag", '<function=brave_search>{"count": 2}</function><|eot_id|>'),
    ],
)
def test_written_calls(call, system, tool_format, text, small):
    dialog = [*([Message("system", system)] if system else []), Message("assistant", "", (call,))]
    rendered = render(dialog, small, tool_format=tool_format)
    written = [i for i, wrote in zip(rendered.ids, rendered.loss_mask, strict=True) if wrote]
    assert spelled(written, small) == text
    message = parse(written, small)
    assert (message.tool_calls, message.content, message.end) == ((call,), "", "eom" if "eom_id|>" in text[-10:] else "eot")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
own_calls = st.builds(ToolCall, names, st.dictionaries(names, json_values, max_size=3))


@settings(deadline=None)
@given(call=own_calls, others=st.lists(own_calls, max_size=2), query=st.text(), ipython=st.booleans())
def test_calls_come_back(small, call, others, query, ipython):
    system = [Message("system", "Environment: ipython")] if ipython else []
    builtin = (ToolCall("wolfram_alpha", {"query": query}),)
    for tool_format, calls in (
        *(("json", (call,)), ("function_tag", (call, *others)), ("python_list", (call, *others))),
        *((any_format, builtin) for any_format in ("json", "function_tag", "python_list")),
    ):
        dialog = [*system, Message("assistant", "", calls)]
        rendered = render(dialog, small, tool_format=tool_format)
        message = parse([i for i, wrote in zip(rendered.ids, rendered.loss_mask, strict=True) if wrote], small)
        assert message.tool_calls == calls
        assert render([*system, message], small, tool_format=tool_format) == rendered


@settings(deadline=None)
@given(content=st.text(), role=st.sampled_from(["system", "user", "ipython"]), prefix=st.booleans())
def test_messages_come_back(small, content, role, prefix):
    ids = render([Message(role, content)], small).ids
    assert parse(ids if prefix else ids[1:], small) == Message(role, content, end="eot")


def test_content_before_calls(small):
    answer = 'I look it up.\n<function=f>{"a": {"b": "}"}}</function>\n<function=g>{}</function>\n<|eot_id|>'
    calls = (ToolCall("f", {"a": {"b": "}"}}), ToolCall("g", {}))
    assert parse(answer, small) == Message("assistant", "I look it up.\n", calls, "eot")
    answer = 'Wait.<|python_tag|>brave_search.call(query="x")<|eom_id|> and more'
    assert parse(answer, small) == Message("assistant", "Wait.", (ToolCall("brave_search", {"query": "x"}),), "eom")
    assert parse('<|python_tag|>[f(city="SF")]<|eot_id|>', small).tool_calls == (ToolCall("f", {"city": "SF"}),)


@pytest.mark.parametrize(
    "text",
    [
        *("", "Hello.", "{", "{}", '{"name": "f"}', '{"name": 1, "parameters": {}}', '{"name": "f", "parameters": [1]}', "[1, 2]", "[]"),
        *('{"type": "person", "name": "f", "parameters": {}}', '{"name": "f", "parameters": {"a": NaN}}', "[f(1)]", "[f(**{})]", "[f()"),
        *('{"name": "f", "parameters": {"a": "\\ud800"}}', "[f(a=1e999)]", '[f(a=b"x")]', "[f(a=x)]", "[f(a=open('x'))]", "[a.f()]"),
        *("[f(a=1), 2]", "<function=f>", "<function=f>{", '<function=f>{"a": 1}</function> and so on', "<function=>{}", "<function=f>[1]"),
        *('os.call(query="x")', 'Use brave_search.call(query="x")', "[" * 5000, '{"a":' * 50_000, "[f(a=" + "-" * 50_000 + "1)]"),
        "[f(a=\x00)]",
    ],
)
def test_garbage_stays_text(text, small):
    assert parse([*small.encode(text), small.special_ids["<|eot_id|>"]], small) == Message("assistant", text, end="eot")
    tagged = parse(f"<|python_tag|>{text}<|eom_id|>", small)
    assert tagged == Message("assistant", "", (ToolCall("code_interpreter", {"code": text}),), "eom")


@settings(deadline=None)
@given(data=st.data())
def test_any_ids_are_a_message(small, data):
    structure = [i for name, i in small.special_ids.items() if "reserved" not in name]
    ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1) | st.sampled_from(structure), max_size=30))
    message = parse(ids, small)
    assert parse(render([message], small).ids, small).tool_calls == message.tool_calls


def test_an_answer_cut_short_has_no_end(small):
    assert parse(small.encode("Hel"), small) == Message("assistant", "Hel", end=None)
    assert parse("Hel<|end_of_text|>lo", small) == Message("assistant", "Hel", end=None)
    assert parse("<|start_header_id|>assistant<|end_header_id|>\n\n\nHel", small).content == "\nHel"
    assert parse("<|start_header_id|>nobody<|end_header_id|>\n\nHel", small).role == "assistant"


def test_where_tools_are_described(small):
    dialog = [Message("system", "s"), Message("user", "u"), Message("user", "v")]
    for tool_format, described in (("json", 1), ("function_tag", 1), ("python_list", 0)):
        for tools in ([TOOL], [{"type": "function", "function": TOOL}]):
            text = spelled(render(dialog, small, tools=tools, tool_format=tool_format).ids, small)
            messages = re.findall(r"\n\n((?s:.*?))<\|eot_id\|><\|", text.replace(TOOL["description"], "") + "<|")
            assert [TOOL["name"] in message for message in messages] == [at == described for at in range(3)]
            assert messages[described].startswith("s\n\n") if described == 0 else messages[described].endswith("\n\nu")
            assert ('"function": {' in text) == (tool_format == "json")
    assert '"trending_songs"' in spelled(render(dialog[1:], small, tools=[TOOL], tool_format="python_list").ids[:20_000], small)


def test_system_prompt():
    day = datetime.date(2024, 9, 21)
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 21 September 2024"
    assert system_prompt("Hi.") == "Hi."
    assert system_prompt(code_interpreter=True) == "Environment: ipython"
    assert system_prompt("Hi.", knowledge_cutoff="December 2023", today=day) == f"{dates}\n\nHi."
    assert system_prompt("Hi.", True, (), "December 2023", day) == f"Environment: ipython\n\n{dates}\n\nHi."
    tools = "Environment: ipython\nTools: brave_search, wolfram_alpha"
    assert system_prompt("Hi.", False, ("brave_search", "wolfram_alpha"), "December 2023", day) == f"{tools}\n{dates}\n\nHi."
    with pytest.raises(UserError, match="builtin_tools has bing: it can have brave_search, wolfram_alpha"):
        system_prompt(builtin_tools=["bing"])


@pytest.mark.parametrize(
    "dialog,complaint",
    [
        ([], "the dialog is empty"),
        (["hello"], "must be a dict with role"),
        ([{"role": "user", "content": "x", "weight": 1}], "must be a dict with role"),
        ([{"role": "human", "content": "x"}], "role 'human': it must be one of system, user, assistant, ipython, tool, developer"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "has a part of type 'image_url': only text is read"),
        ([{"role": "assistant", "content": "x", "reasoning_content": 3}], "reasoning of the assistant message is of type int"),
        ([{"role": ["user"], "content": "x"}], "a message has the role"),
        ([{"role": "user"}], "type NoneType: it must be text"),
        ([{"role": "user", "content": "\ud800"}], "the dialog holds what is neither text nor JSON"),
        ([{"role": "user", "content": "x", "tool_calls": [{"name": "f", "arguments": {}}]}], "only an assistant message"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "tool call 'f' are not JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": {1, 2}}}]}], "neither text nor JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "must have a name and a dict of arguments"),
        ([Message("assistant", "", (SONGS, SONGS))], "makes 2 tool calls"),
        ([{"role": "assistant", "content": "x", "end": "stop"}], "end of the assistant message is 'stop'"),
    ],
)
def test_bad_dialogs_are_refused(dialog, complaint, small):
    with pytest.raises(UserError, match=re.escape(complaint)):
        render(dialog, small)


def test_dialogs_as_chat_servers_have_them(small):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    theirs = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "3", "tool_call_id": "0"},
    ]
    ours = [Message("system", "be brief"), Message("user", "one two"), Message("assistant", "", (ToolCall("f", {}),)), Message("ipython", "3")]
    assert render(theirs, small).ids == render(ours, small).ids


def test_what_the_format_has_no_place_for(small, tmp_path):
    call = Message("assistant", "", (ToolCall("not a name", {}),))
    with pytest.raises(UserError, match="cannot be written in Python"):
        render([call], small, tool_format="python_list")
    with pytest.raises(UserError, match="tool_format is 'xml': it must be one of json, function_tag, python_list"):
        render([call], small, tool_format="xml")
    with pytest.raises(UserError, match="first user message and the dialog has none"):
        render([call], small, tools=[TOOL])
    with pytest.raises(UserError, match="tools must be a list of dicts"):
        render([Message("user", "x")], small, tools=[{"title": "f"}])
    with pytest.raises(UserError, match="no chat template and is not of Llama 3"):
        render([Message("user", "x")], load_tokenizer("bytes"))
