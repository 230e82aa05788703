"""Markup in which text of unknown origin stays text: neither a browser nor an XML parser obeys it."""

import html
import re

_VOID = {"meta"}  # elements that have no end
# No XML parser takes these, a browser replaces or drops them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Markup. Any other str is text, which `element` escapes."""


def element(name: str, /, *children: str, **attributes) -> Html:
    """Returns `<name attributes>children</name>`; "class_" writes class, "stroke_width" stroke-width; an attribute that is None is left out."""
    given = {key.rstrip("_").replace("_", "-"): escape(str(value)) for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{value}"' for key, value in given.items())
    return Html(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{join(children)}</{name}>")


def join(children) -> Html:
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def escape(text: str) -> str:
    return html.escape(_CONTROL.sub("\ufffd", text))
