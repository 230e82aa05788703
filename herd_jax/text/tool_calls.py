"""Tool calls as Llama 3.1 and 3.2 write them, in both directions, and the texts that tell a model which tools there are.

Built-in tools are called as `brave_search.call(query="...")`, the code interpreter by code, both behind <|python_tag|>. A user's own
tools have one of three formats: "json", "function_tag" (<function=name>{...}</function>), "python_list" ([f(a=1), g()], of Llama 3.2).
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from herd_jax.errors import UserError
from herd_jax.text.messages import ToolCall, check_json

BUILTIN_TOOLS = ("brave_search", "wolfram_alpha")
CODE_INTERPRETER = "code_interpreter"
TOOL_FORMATS = ("json", "function_tag", "python_list")

INSTRUCTIONS = {
    "json": """You can call the functions that are defined below in JSON.
If one of them helps to answer, reply with nothing but a call of it, a JSON object of this form:
{"type": "function", "name": "the function's name", "parameters": {"a parameter's name": "its value"}}
If none does, answer in words.""",
    "function_tag": """You can call the functions that are defined below in JSON.
If one of them helps to answer, reply with nothing but a call of it, on one line, of this form:
<function=the_name>{"a parameter's name": "its value"}</function>
If none does, answer in words.""",
    "python_list": """You can call the functions that are defined below in JSON.
If some of them help to answer, reply with nothing but a list of calls in Python, of this form:
[first_name(parameter="its value", other=2), second_name()]
If none does, or if a required parameter is not known, say so in words.""",
}


def describe_tools(tools: Sequence[Mapping[str, Any]], tool_format: str) -> str:
    """Returns what a model is told of the user's own tools: dicts with name, description, parameters (a JSON schema), bare or as the
    "function" of a dict. Raises UserError where they are not that."""
    check_json(tools, "tools")
    functions = [tool.get("function", tool) if isinstance(tool, Mapping) else {} for tool in tools]
    if not all(isinstance(function, Mapping) and isinstance(function.get("name"), str) for function in functions):
        raise UserError("tools must be a list of dicts with name, description and parameters")
    wrapped = [{"type": "function", "function": function} for function in functions] if tool_format == "json" else functions
    return "\n\n".join((INSTRUCTIONS[tool_format], *(json.dumps(tool, indent=4, ensure_ascii=False) for tool in wrapped)))


def write_calls(calls: Sequence[ToolCall], tool_format: str, has_ipython: bool) -> tuple[bool, str]:
    """Returns whether <|python_tag|> comes before the calls, and their text. `has_ipython`: the system message says "Environment: ipython",
    which puts the tag before JSON calls, too. Raises UserError for several calls in a format that has one a message."""
    builtin = [text for call in calls if (text := _write_builtin(call)) is not None]
    if len(calls) > 1 and (builtin or tool_format == "json"):
        raise UserError(
            f"a message makes {len(calls)} tool calls, and it can make one of a built-in tool or in the format 'json': "
            "make them in messages of their own, or use tool_format 'python_list' or 'function_tag' for your own tools"
        )
    if builtin:
        return True, builtin[0]
    if tool_format == "json":
        # Written as Meta's reference does, down to the escapes.
        return has_ipython, json.dumps({"type": "function", "name": calls[0].name, "parameters": calls[0].arguments})
    if tool_format == "function_tag":
        return False, "".join(f"<function={call.name}>{json.dumps(call.arguments)}</function>" for call in calls)
    return False, f"[{', '.join(_write_python_call(call) for call in calls)}]"


def read_calls(text: str, is_tagged: bool) -> tuple[str, tuple[ToolCall, ...]]:
    """Returns the text before the calls and the calls in what an assistant wrote, behind <|python_tag|> (`is_tagged`) or not.

    What is not wholly well-formed calls stays text, or behind the tag code for the interpreter.
    """
    for reader in (_read_builtin, _read_json, _read_python_list):
        if calls := _checked(reader(text.strip())):
            return "", calls
    content, start, rest = text.partition("<function=")
    if (not is_tagged or not content.strip()) and (calls := _checked(_read_function_tags(start + rest))):
        return content, calls
    return ("", (ToolCall(CODE_INTERPRETER, {"code": text}),)) if is_tagged else (text, ())


def read_tagged_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Returns the text before the calls and the calls in what an assistant wrote in the format of Hermes, which many chat templates have: JSON
    objects, or lists of them, each between <tool_call> and </tool_call>. The last closing tag may be missing."""
    content, *blocks = text.split("<tool_call>")
    calls: list[ToolCall] = []
    for block in blocks:
        inside, _, rest = block.partition("</tool_call>")
        try:
            found = json.loads(inside)
        except (ValueError, RecursionError):
            return text, ()
        several = [_read_json(json.dumps(one)) for one in (found if isinstance(found, list) else [found])]
        if rest.strip() or not all(several):
            return text, ()
        calls += [call for one in several for call in one]
    checked = _checked(tuple(calls))
    return (content.rstrip(), checked) if checked else (text, ())


def _checked(calls: tuple[ToolCall, ...]) -> tuple[ToolCall, ...]:
    """Returns the calls, and nothing where their arguments are not JSON (Python has bytes, and 1e999 is infinite): such calls could not be
    written again."""
    try:
        check_json([[call.name, call.arguments] for call in calls], "the answer")
    except UserError:
        return ()
    return calls


def _write_builtin(call: ToolCall) -> str | None:
    """Returns a call of a built-in tool as text, None where it is none. The text of a query stands as it is: whatever quotes it holds, it ends
    at the last one."""
    if call.name in BUILTIN_TOOLS and call.arguments.keys() == {"query"} and isinstance(call.arguments["query"], str):
        return f'{call.name}.call(query="{call.arguments["query"]}")'
    if call.name == CODE_INTERPRETER and call.arguments.keys() == {"code"} and isinstance(call.arguments["code"], str):
        return call.arguments["code"]
    return None


def _read_builtin(text: str) -> tuple[ToolCall, ...]:
    match = re.fullmatch(rf'({"|".join(BUILTIN_TOOLS)})\.call\(query="(.*)"\)', text, re.DOTALL)
    return (ToolCall(match[1], {"query": match[2]}),) if match else ()


def _read_json(text: str) -> tuple[ToolCall, ...]:
    try:
        call = json.loads(text) if text.startswith("{") else {}
    except (ValueError, RecursionError):
        return ()
    arguments = call.get("parameters", call.get("arguments"))
    is_call = isinstance(call.get("name"), str) and isinstance(arguments, dict) and call.get("type", "function") == "function"
    return (ToolCall(call["name"], arguments),) if is_call else ()


def _read_function_tags(text: str) -> tuple[ToolCall, ...]:
    """Reads all of `text`, or nothing. The last closing tag may be missing."""
    calls, at = [], 0
    while at < len(text):
        start = re.compile(r"<function=([^<>{}]+)>\s*(?={)").match(text, at)
        if not start:
            return ()
        try:
            arguments, at = json.JSONDecoder().raw_decode(text, start.end())
        except (ValueError, RecursionError):
            return ()
        calls.append(ToolCall(start[1], arguments))
        at = re.compile(r"\s*(</function>)?\s*").match(text, at).end()
    return tuple(calls)


def _write_python_call(call: ToolCall) -> str:
    if not all(name.isidentifier() for name in (call.name, *call.arguments)):
        raise UserError(f"the tool call {call.name!r} cannot be written in Python: give tool and parameters names that are identifiers")
    return f"{call.name}({', '.join(f'{name}={_write_python_value(value)}' for name, value in call.arguments.items())})"


def _write_python_value(value: Any) -> str:
    match value:
        case str():
            return json.dumps(value, ensure_ascii=False)  # JSON text is Python text, with the quotes that Llama 3.2 writes
        case list() | tuple():
            return f"[{', '.join(map(_write_python_value, value))}]"
        case dict():
            return f"{{{', '.join(f'{json.dumps(key, ensure_ascii=False)}: {_write_python_value(item)}' for key, item in value.items())}}}"
        case _:
            return repr(value)


def _read_python_list(text: str) -> tuple[ToolCall, ...]:
    """Reads calls of plain names with literal keyword arguments in a list that is not empty."""
    if not text.startswith("["):
        return ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes in strings
            return tuple(_python_calls(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return ()


def _python_calls(tree: ast.expr) -> Iterator[ToolCall]:
    if not isinstance(tree, ast.List):
        raise ValueError("not a list")
    for call in tree.elts:
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not a call with keyword arguments")
        if any(argument.arg is None for argument in call.keywords):
            raise ValueError("arguments are unpacked")
        yield ToolCall(call.func.id, {argument.arg: ast.literal_eval(argument.value) for argument in call.keywords})
