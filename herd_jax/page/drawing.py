"""Drawings as SVG markup, whose colours are those of the page. Lengths are pixels."""

from collections.abc import Sequence

from herd_jax.page.markup import Html, element

BAR = 14  # the height of a bar that lies


def svg(width: float, height: float, drawn: Sequence[Html], title: str) -> Html:
    return element("svg", *drawn, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


def bar(x: float, y: float, width: float, kind: str, height: float = BAR) -> Html:
    return element("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", rx=2, class_=kind)


def text(x: float, y: float, content: str, kind: str, anchor: str | None = None) -> Html:
    return element("text", content, x=f"{x:.1f}", y=y, class_=kind, text_anchor=anchor)
