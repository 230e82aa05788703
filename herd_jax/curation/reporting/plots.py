"""The drawings of the report as SVG markup, whose colours are those of the page: the waterfall and histograms."""

from collections.abc import Callable, Sequence

from herd_jax.curation.reporting.data import CurationReport, Step
from herd_jax.curation.reporting.formats import percent, short
from herd_jax.page.drawing import bar, svg, text
from herd_jax.page.markup import Html, element

ROW = 24  # height, in pixels as all lengths here
NAME_END, DOCUMENTS_AT, DOCUMENTS_WIDTH, CHARACTERS_AT, CHARACTERS_WIDTH = 190, 200, 440, 790, 170
WIDTH = 1040
RAW = "raw"  # in the place of a number of characters before extraction


def waterfall(report: CurationReport) -> Html:
    """Draws a row for each block: what it kept, what it dropped beside it; documents at the left, characters of text at the right."""
    documents = max((step.documents for step in report.steps), default=0)
    characters = max((step.characters for step in report.steps if step.has_text), default=0)
    drawn = [
        text(DOCUMENTS_AT, 14, f"documents: {short(documents)} read", "head"),
        text(CHARACTERS_AT, 14, "characters kept", "head"),
    ]
    y, phase = 24, None
    for step in report.steps:
        if step.phase != phase:
            phase = step.phase
            drawn += [element("line", x1=0, x2=WIDTH, y1=y + 4, y2=y + 4, class_="rule"), text(0, y + 21, phase, "phase")]
            y += 8
        drawn.append(_row(step, y, documents, characters))
        y += ROW
    return svg(WIDTH, y + 6, drawn, "Documents and characters that each block kept and dropped")


def _row(step: Step, y: float, documents: int, characters: int) -> Html:
    kept, dropped = (DOCUMENTS_WIDTH * count / documents if documents else 0 for count in (step.kept, step.dropped))
    tip = f"{step.block}: {step.documents:,} documents in, {step.dropped:,} dropped, {step.kept:,} kept with {step.characters:,} characters"
    change = f"\u2212{percent(step.dropped, step.documents)}" if step.dropped else ""
    drawn = [
        element("title", tip),
        text(NAME_END, y + 16, step.block, "name"),
        bar(DOCUMENTS_AT, y + 5, DOCUMENTS_WIDTH, "track"),
        bar(DOCUMENTS_AT, y + 5, kept, "kept"),
        bar(DOCUMENTS_AT + kept, y + 5, max(dropped, 1.5 if step.dropped else 0), "dropped"),
        text(DOCUMENTS_AT + DOCUMENTS_WIDTH + 58, y + 16, short(step.kept), "number"),
        text(DOCUMENTS_AT + DOCUMENTS_WIDTH + 122, y + 16, change, "number loss"),
    ]
    if step.has_text:
        long = CHARACTERS_WIDTH * step.characters / characters if characters else 0
        drawn += [bar(CHARACTERS_AT, y + 5, CHARACTERS_WIDTH, "track"), bar(CHARACTERS_AT, y + 5, long, "kept soft")]
        drawn.append(text(WIDTH - 16, y + 16, short(step.characters), "number"))
    else:
        drawn.append(text(WIDTH - 16, y + 16, RAW, "number faint"))
    return element("g", *drawn)


def histogram(edges: Sequence[float], counts: Sequence[int], label: Callable[[float], str]) -> Html:
    """Draws a bar for each bin; the first, the middle and the last edge are written."""
    width, height, gap = 300, 96, 1.5
    most, step = max(counts), width / len(counts)
    drawn = []
    for number, count in enumerate(counts):
        tall = max(height * count / most, 1 if count else 0)
        tip = element("title", f"{label(edges[number])} to {label(edges[number + 1])}: {count:,} documents")
        drawn.append(element("g", tip, bar(number * step, height - tall, step - gap, "kept", tall)))
    drawn.append(element("line", x1=0, x2=width, y1=height + 0.5, y2=height + 0.5, class_="rule"))
    for number, anchor in ((0, "start"), (len(counts) // 2, "middle"), (len(counts), "end")):
        drawn.append(text(number * step, height + 14, label(edges[number]), "tick", anchor))
    return svg(width, height + 18, drawn, "Histogram")
