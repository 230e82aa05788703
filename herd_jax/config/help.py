"""What `--help` says of a config: each key with its type, default and meaning, which is the comment behind the field's declaration."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterator

from herd_jax.config.values import fields_of, is_required, join, sections_of, type_name

WIDTH = 110


def help_of(cls: type, usage: str) -> str:
    """Returns the text: a group of lines for each section, headed by what the section is."""
    lines = [f"usage: {usage}"]
    for path, section in _groups(cls, "config"):
        lines += ["", *textwrap.wrap(f"{path}: {_first_sentence(section)}", WIDTH)]
        for name, kind, default, meaning in _rows(section, path):
            flag = name if "[]" in name else f"--{name}"  # items of a tuple are written in the file, or as one value
            lines += [f"  {flag}  {kind}, {default}", *textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


def _groups(cls: type, path: str) -> Iterator[tuple[str, type]]:
    """The config itself and each section below it, also those that a tuple's items are ("phases[]")."""
    yield path, cls
    for name, section in sections_of(cls).items():
        yield from _groups(section, join(path, name))
    for name, item in _items(cls).items():
        yield from _groups(item, f"{join(path, name)}[]")


def _items(cls: type) -> dict[str, type]:
    """Returns the dataclasses of which fields hold tuples, by field."""
    hints = typing.get_type_hints(cls)
    args = {field.name: typing.get_args(hints[field.name]) for field in fields_of(cls) if typing.get_origin(hints[field.name]) is tuple}
    return {name: of[0] for name, of in args.items() if dataclasses.is_dataclass(of[0])}


def _rows(cls: type, path: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields name, type, default and meaning of each field that is no section of its own."""
    hints, sections, meanings = typing.get_type_hints(cls), sections_of(cls), field_comments(cls)
    for field in fields_of(cls):
        if field.name not in sections:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            text = "required" if is_required(field) else f"default {textwrap.shorten(repr(default), 70)}"
            yield join(path, field.name), type_name(hints[field.name]), text, meanings.get(field.name, "")


def field_comments(cls: type) -> dict[str, str]:
    """Returns the comment that stands behind the declaration of each field of a dataclass."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}
    found = {node.target.id: comments.get(node.end_lineno, "") for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)}
    return {name: comment.lstrip("# ") for name, comment in found.items()}


def _first_sentence(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").split())
    return text.partition(". ")[0].rstrip(".") + "."
