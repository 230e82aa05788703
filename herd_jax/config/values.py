"""A mapping becomes a frozen dataclass, and back. Knows no room's fields.

The dataclass (nested: a section is a field that is a dataclass) declares every key with its type and default; its own
`__post_init__` says which values are allowed. Here a mapping is matched with that declaration, and each error names the full key.
"""

import ast
import dataclasses
import difflib
import enum
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from herd_jax.errors import UserError

Config = TypeVar("Config")


class _Mismatch(Exception):
    """A value that is not of the type its field declares."""


def parse(cls: type[Config], mapping: Mapping[str, Any], path: str = "") -> Config:
    """An instance of the frozen dataclass `cls` with the values of `mapping`; absent keys take their defaults.

    Values may be strings, as from a command line: "16_777_216" or "1e6" for an int, "true", "none" for an optional, "1,2" for a
    tuple, "path" or "path:0.3,other:0.7" for weights (dict[str, float]), and a python literal for any tuple, dict or section.
    `path` is the dotted name of `cls` itself. Raises UserError for unknown keys, missing ones and values of another type.
    """
    for key in _unknown_keys(cls, mapping, path):
        raise UserError(f"unknown config key '{key}': {_suggestion(key, _names(cls, path))}")
    return _build(cls, mapping, path)


class NotGiven(enum.Enum):
    """The value of a field that was left out, where None is a value of its own: `name: X | None | NotGiven = NOT_GIVEN`.

    In a dict that is written, such a field is absent if it was left out, and the text "none" if it is None: there None can only come from an
    earlier version, which meant that it was left out (`training.resume.parse_saved`).
    """

    NOT_GIVEN = "not given"

    def __repr__(self) -> str:
        return self.value


NOT_GIVEN = NotGiven.NOT_GIVEN


def number(text: str) -> float:
    """Returns the number that a flag of a command says; NaN is none. Raises ValueError."""
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


def check_name(cls: type, name: str, key: str) -> None:
    """Raises UserError where `name`, which `key` names, is no dotted name of a field or section of the config `cls`."""
    names = _names(cls, "")
    if name not in names:
        raise UserError(f"{key} names '{name}', which is no config key: {_suggestion(name, names)}")


def to_dict(instance: Any) -> dict[str, Any]:
    """The config as nested dicts and lists that JSON can write; `parse` reads them back."""
    return json.loads(json.dumps(_plain(instance)))


def _plain(value: Any) -> Any:
    """Returns dataclasses as dicts, also those in tuples and dicts."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: (getattr(value, field.name), field.default is NOT_GIVEN) for field in dataclasses.fields(value)}
        kept = {name: (of, may_be_absent) for name, (of, may_be_absent) in fields.items() if of is not NOT_GIVEN}
        return {name: "none" if of is None and may_be_absent else _plain(of) for name, (of, may_be_absent) in kept.items()}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted names of the leaves whose values differ between two results of `to_dict`, or that only one of them has."""
    old_leaves, new_leaves = dict(_leaves(old)), dict(_leaves(new))
    absent = object()
    return [key for key in {**old_leaves, **new_leaves} if old_leaves.get(key, absent) != new_leaves.get(key, absent)]


def _build(cls: type, mapping: Any, path: str) -> Any:
    if isinstance(mapping, str):
        mapping = _literal(mapping)
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        raise _Mismatch
    hints, sections, values = typing.get_type_hints(cls), sections_of(cls), {}
    for field in fields_of(cls):
        key = join(path, field.name)
        if field.name in mapping:
            try:
                values[field.name] = _coerce(hints[field.name], mapping[field.name], key)
            except _Mismatch:
                value = mapping[field.name]
                raise UserError(
                    f"config key '{key}' must be {type_name(hints[field.name])}, got {value!r} ({type(value).__name__})"
                ) from None
        elif is_required(field):
            if field.name not in sections:
                raise UserError(f"config key '{key}' is required: set it in the config file or give --config.{key}=VALUE")
            values[field.name] = _build(sections[field.name], {}, key)
    return cls(**values)


def _coerce(hint: Any, value: Any, key: str) -> Any:
    """The value as the type `hint`; raises _Mismatch where it is another."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(args, value, key)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key)
    if origin is tuple:
        assert args[1:] == (Ellipsis,), f"{key}: only tuple[X, ...] is read"
        return tuple(_coerce_item(args[0], item, f"{key}[{index}]") for index, item in enumerate(_items(value)))
    if origin is dict:
        assert args[0] is str, f"{key}: only dict[str, X] is read"
        return {name: _coerce(args[1], item, f"{key}.{name}") for name, item in _weights(value, key).items()}
    return _coerce_scalar(hint, value)


def _coerce_scalar(hint: type, value: Any) -> Any:
    if hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        found = _number(value) if isinstance(value, str) else value
        if found != found:
            raise _Mismatch  # no setting means NaN, and no comparison would find it
        if hint is float:
            return float(found)
        if isinstance(found, int) or found.is_integer():
            return int(found)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    assert hint in (str, bool, int, float), f"no way to read a {hint}"
    raise _Mismatch


def _coerce_union(members: tuple[Any, ...], value: Any, key: str) -> Any:
    if types.NoneType in members and (value is None or isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    for member in members:
        if member not in (types.NoneType, NotGiven):
            try:
                return _coerce(member, value, key)
            except _Mismatch:
                continue
    raise _Mismatch


def _coerce_item(hint: Any, item: Any, key: str) -> Any:
    """An item of a tuple; a dataclass there is a config of its own, with names that start at `key`."""
    return parse(hint, item, key) if dataclasses.is_dataclass(hint) and isinstance(item, Mapping) else _coerce(hint, item, key)


def _number(text: str) -> int | float:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    raise _Mismatch


def _items(value: Any) -> list | tuple:
    if isinstance(value, str):
        if value.lstrip()[:1] in ("(", "["):
            value = _literal(value)
        elif "," in value and os.path.exists(os.path.expanduser(value)):  # the name of a file with a comma in it
            value = [value]
        else:
            value = [item.strip() for item in value.split(",") if item.strip()]
    if not isinstance(value, list | tuple):
        raise _Mismatch
    return value


def _weights(value: Any, key: str) -> Mapping[str, Any]:
    """name -> weight of "name", "name:0.3,other:0.7", a python literal, or a mapping."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _literal(value)
    elif isinstance(value, str):
        matches = [re.fullmatch(r"(.+?)(?::([-+.\d][-+.\w]*))?", item.strip()) for item in value.split(",") if item.strip()]
        names = [match[1] for match in matches if match]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{key} names {min(repeated)} more than once: give each one weight")
        value = {match[1]: match[2] or 1.0 for match in matches if match}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _Mismatch
    return value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        raise _Mismatch from None


def fields_of(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.init]


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def sections_of(cls: type) -> dict[str, type]:
    """Field name -> dataclass of the fields that hold one, optional or not."""
    found, hints = {}, typing.get_type_hints(cls)
    for field in fields_of(cls):
        hint = hints[field.name]
        members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        found |= {field.name: member for member in members if dataclasses.is_dataclass(member)}
    return found


def _names(cls: type, path: str) -> list[str]:
    """The dotted names of every field and section below `path`."""
    nested = [name for field, section in sections_of(cls).items() for name in _names(section, join(path, field))]
    return [join(path, field.name) for field in fields_of(cls)] + nested


def _unknown_keys(cls: type, mapping: Any, path: str) -> Iterator[str]:
    if isinstance(mapping, Mapping):
        known, sections = {field.name for field in fields_of(cls)}, sections_of(cls)
        for key, value in mapping.items():
            if key not in known:
                yield join(path, key)
            elif key in sections:
                yield from _unknown_keys(sections[key], value, join(path, key))


def _suggestion(key: str, names: list[str]) -> str:
    section, _, last = key.rpartition(".")
    if same_last_name := [name for name in names if name.rpartition(".")[2] == last]:
        return f"did you mean '{difflib.get_close_matches(key, same_last_name, n=1, cutoff=0.0)[0]}'?"
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section}
    anywhere = {name.rpartition(".")[2]: name for name in names}
    same_letter = {short: name for short, name in beside.items() if short[:1] == last[:1]}
    for last_names, cutoff in ((same_letter, 0.5), (beside, 0.7), (anywhere, 0.75)):  # of whole names, a long section makes any two alike
        if near := difflib.get_close_matches(last, last_names, n=1, cutoff=cutoff):
            return f"did you mean '{last_names[near[0]]}'?"
    return f"the keys{f' of {section}' if section and beside else ''} are {', '.join(beside if section and beside else names)}"


def _leaves(mapping: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, join(path, key))
        else:
            yield join(path, key), value


def type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else re.sub(r"\w+\.(?=\w)", "", str(hint))


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)
