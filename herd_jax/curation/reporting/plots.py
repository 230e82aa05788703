"""The drawings of the report as SVG markup, whose colours are those of the page: the waterfall and histograms."""

from collections.abc import Callable, Sequence

from herd_jax.curation.reporting.data import Report, Step
from herd_jax.curation.reporting.formats import Html, element, percent, short

ROW, BAR = 24, 14  # heights, in pixels as all lengths here
NAME_END, DOCUMENTS_AT, DOCUMENTS_WIDTH, CHARACTERS_AT, CHARACTERS_WIDTH = 190, 200, 440, 790, 170
WIDTH = 1040
RAW = "raw"  # in the place of a number of characters before extraction


def waterfall(report: Report) -> Html:
    """A row a block: what it kept, what it dropped beside it; documents at the left, characters of text at the right."""
    documents = max((step.documents for step in report.steps), default=0)
    characters = max((step.characters for step in report.steps if step.has_text), default=0)
    drawn = [
        _text(DOCUMENTS_AT, 14, f"documents: {short(documents)} read", "head"),
        _text(CHARACTERS_AT, 14, "characters kept", "head"),
    ]
    y, phase = 24, None
    for step in report.steps:
        if step.phase != phase:
            phase = step.phase
            drawn += [element("line", x1=0, x2=WIDTH, y1=y + 4, y2=y + 4, class_="rule"), _text(0, y + 21, phase, "phase")]
            y += 8
        drawn.append(_row(step, y, documents, characters))
        y += ROW
    return _svg(WIDTH, y + 6, drawn, "Documents and characters that each block kept and dropped")


def _row(step: Step, y: float, documents: int, characters: int) -> Html:
    kept, dropped = (DOCUMENTS_WIDTH * count / documents if documents else 0 for count in (step.kept, step.dropped))
    tip = f"{step.block}: {step.documents:,} documents in, {step.dropped:,} dropped, {step.kept:,} kept with {step.characters:,} characters"
    change = f"\u2212{percent(step.dropped, step.documents)}" if step.dropped else ""
    drawn = [
        element("title", tip),
        _text(NAME_END, y + 16, step.block, "name"),
        _bar(DOCUMENTS_AT, y + 5, DOCUMENTS_WIDTH, "track"),
        _bar(DOCUMENTS_AT, y + 5, kept, "kept"),
        _bar(DOCUMENTS_AT + kept, y + 5, max(dropped, 1.5 if step.dropped else 0), "dropped"),
        _text(DOCUMENTS_AT + DOCUMENTS_WIDTH + 58, y + 16, short(step.kept), "number"),
        _text(DOCUMENTS_AT + DOCUMENTS_WIDTH + 122, y + 16, change, "number loss"),
    ]
    if step.has_text:
        long = CHARACTERS_WIDTH * step.characters / characters if characters else 0
        drawn += [_bar(CHARACTERS_AT, y + 5, CHARACTERS_WIDTH, "track"), _bar(CHARACTERS_AT, y + 5, long, "kept soft")]
        drawn.append(_text(WIDTH - 16, y + 16, short(step.characters), "number"))
    else:
        drawn.append(_text(WIDTH - 16, y + 16, RAW, "number faint"))
    return element("g", *drawn)


def histogram(edges: Sequence[float], counts: Sequence[int], label: Callable[[float], str]) -> Html:
    """A bar a bin; the first, the middle and the last edge are written."""
    width, height, gap = 300, 96, 1.5
    most, step = max(counts), width / len(counts)
    drawn = []
    for number, count in enumerate(counts):
        tall = max(height * count / most, 1 if count else 0)
        tip = element("title", f"{label(edges[number])} to {label(edges[number + 1])}: {count:,} documents")
        drawn.append(element("g", tip, _bar(number * step, height - tall, step - gap, "kept", tall)))
    drawn.append(element("line", x1=0, x2=width, y1=height + 0.5, y2=height + 0.5, class_="rule"))
    for number, anchor in ((0, "start"), (len(counts) // 2, "middle"), (len(counts), "end")):
        drawn.append(_text(number * step, height + 14, label(edges[number]), "tick", anchor))
    return _svg(width, height + 18, drawn, "Histogram")


def _svg(width: float, height: float, drawn: Sequence[Html], title: str) -> Html:
    return element("svg", *drawn, viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


def _bar(x: float, y: float, width: float, kind: str, height: float = BAR) -> Html:
    return element("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", rx=2, class_=kind)


def _text(x: float, y: float, text: str, kind: str, anchor: str | None = None) -> Html:
    return element("text", text, x=f"{x:.1f}", y=y, class_=kind, text_anchor=anchor)
