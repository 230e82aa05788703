"""Verifiers: whether an answer to a prompt is right, by what the prompt's record says, without a model (sections 4.3.1, 4.3.3 of the paper)."""

import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from herd_jax.errors import UserError
from herd_jax.sandbox.run import check_contained, runs_to_its_end

Verifier = Callable[[Mapping[str, Any], str], float]  # (record of the prompt, text of the answer) -> 0 (wrong) to 1 (right)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
BLOCK = re.compile(r"```(?:python)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def exact(record: Mapping[str, Any], text: str) -> float:
    """Compares the whole answer with the record's "answer", a text or a list of texts of which any is right; spaces around them do not count."""
    right = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    return float(text.strip() in [str(answer).strip() for answer in right])


def last_number(record: Mapping[str, Any], text: str) -> float:
    """Compares the last number of the answer with the record's "answer"."""
    found = NUMBER.findall(text)
    value = lambda number: float(str(number).replace(",", ""))
    return float(bool(found) and value(found[-1]) == value(record["answer"]))


def pattern(record: Mapping[str, Any], text: str) -> float:
    """Asks for the whole answer to match the record's "pattern", a regular expression."""
    return float(re.fullmatch(record["pattern"], text.strip(), re.DOTALL) is not None)


def json_value(record: Mapping[str, Any], text: str) -> float:
    """Asks for JSON: equal to the record's "answer" where it has one."""
    try:
        found = json.loads(text)
    except ValueError:
        return 0.0
    return float("answer" not in record or found == record["answer"])


def python(record: Mapping[str, Any], text: str, unsafe_execution: bool = False) -> float:
    """Runs the answer's program (its first block of code, or all of it) with the record's "tests" behind it, in the sandbox."""
    block = BLOCK.search(text)
    return float(runs_to_its_end(f"{block[1] if block else text}\n\n{record['tests']}", unsafe=unsafe_execution))


VERIFIERS: dict[str, Verifier] = {"exact": exact, "number": last_number, "pattern": pattern, "json": json_value, "python": python}


def find_verifier(name: str, unsafe_execution: bool = False) -> Verifier:
    """Returns the verifier of that name, or the function that MODULE:FUNCTION names. Raises UserError where there is none, or programs cannot be
    contained here."""
    if name == "python":
        check_contained(unsafe_execution)
        return functools.partial(python, unsafe_execution=unsafe_execution)
    if name in VERIFIERS:
        return VERIFIERS[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise UserError(f"there is no verifier '{name}': it must be one of {', '.join(VERIFIERS)}, or MODULE:FUNCTION")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the verifier {name} cannot be imported ({error}): name a module on the path, and a function in it") from error
