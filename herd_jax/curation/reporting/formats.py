"""How the report writes values: numbers for people, and text of unknown origin so that neither a browser nor a terminal obeys it."""

import html
import re

_VOID = {"meta"}  # elements that have no end
# No XML parser takes these, a browser replaces or drops them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Markup. Any other str is text, which `element` escapes."""


def element(name: str, /, *children: str, **attributes) -> Html:
    """`<name attributes>children</name>`; "class_" writes class, "stroke_width" stroke-width; an attribute that is None is left out."""
    given = {key.rstrip("_").replace("_", "-"): escape(str(value)) for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{value}"' for key, value in given.items())
    return Html(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{join(children)}</{name}>")


def join(children) -> Html:
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def escape(text: str) -> str:
    return html.escape(_CONTROL.sub("\ufffd", text))


def printable(text: str) -> str:
    """For a terminal: without control characters, changes of writing direction and lone surrogates."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def short(number: float) -> str:
    """12345678 as 12.3M, 12345 as 12,345."""
    for factor, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if abs(number) >= 0.9995 * factor and abs(number) >= 99_950:
            scaled = number / factor
            return f"{scaled:.0f}{unit}" if abs(scaled) >= 99.95 else f"{scaled:.1f}{unit}"
    return f"{number:,.0f}"


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
