"""A page that loads nothing and runs nothing: a header, links to its sections, the sections; and the tables in them."""

from collections.abc import Sequence
from typing import Any

from herd_jax.page.markup import Html, element, join
from herd_jax.page.style import STYLE


def page(title: str, header: Html, sections: Sequence[tuple[str, Html]], style: str = "") -> str:
    """Returns a page that loads nothing. `sections` are pairs of a title, which is also the anchor, and what stands below it. `style`: rules
    besides the common ones."""
    head = join(
        [
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
            element("title", title),
            element("style", Html(STYLE + style)),
        ]
    )
    body = [header, element("nav", *(element("a", title, href=f"#{_anchor(title)}") for title, _ in sections))]
    body += [element("section", element("h2", title), content, id=_anchor(title)) for title, content in sections]
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>{element("body", element("main", *body))}</html>\n'


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html:
    """Returns a table, in which columns with numbers stand at the right."""
    kinds = ["n" if any(_is_number(row[column]) for row in rows) else None for column in range(len(names))]

    def line(kind_of_cell: str, values: Sequence[Any]) -> Html:
        texts = (value if isinstance(value, str) else f"{value:,}" for value in values)
        return element("tr", *(element(kind_of_cell, text, class_=kind) for text, kind in zip(texts, kinds, strict=True)))

    return element(
        "div", element("table", element("thead", line("th", names)), element("tbody", *(line("td", row) for row in rows))), class_="scroll"
    )


def code(text: str) -> Html:
    return element("code", text)


def note(text: str) -> Html:
    return element("span", text, class_="note")


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Returns plain values by their names with dots, as the command line has them."""
    if not isinstance(value, dict) and not (isinstance(value, list) and any(isinstance(item, dict | list) for item in value)):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [pair for key, item in items for pair in flat(item, f"{name}.{key}" if name else key)]


def cell(value: Any) -> str | int:
    """Returns a plain value as a table shows it."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value) if isinstance(value, bool) else value


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) or (not isinstance(value, Html) and value.lstrip("~+\u2212")[:1].isdigit())


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")
