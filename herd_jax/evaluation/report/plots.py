"""The drawings of the report, as SVG whose colours are those of the page: each has its numbers in a table beside it, too."""

import math
from collections.abc import Iterable, Sequence

from herd_jax.page.drawing import BAR, bar, svg, text
from herd_jax.page.markup import Html, element

NUM_COLOURS = 6  # of models, and of sources
WIDTH, NAME_END, BARS_AT, BARS_WIDTH = 1040, 250, 262, 640
STYLE = """
:root { --m0: #2f6fdb; --m1: #d9622b; --m2: #23855d; --m3: #8150c4; --m4: #b83280; --m5: #7a7a1f; }
@media (prefers-color-scheme: dark) { :root { --m0: #6ba1f5; --m1: #f08f5c; --m2: #4fbf90; --m3: #b18bea; --m4: #e878b8; --m5: #c3c352; } }
""" + "\n".join(
    f"svg .m{n} {{ fill: var(--m{n}); }} svg .l{n} {{ stroke: var(--m{n}); fill: none; }} .key.m{n} {{ background: var(--m{n}); }}"
    for n in range(NUM_COLOURS)
) + """
svg .axis { stroke: var(--rule); }
svg .chance { stroke: var(--muted); stroke-dasharray: 3 4; }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; }
svg .curve { stroke-width: 1.8; stroke-linejoin: round; }
svg .end { text-anchor: end; }
svg .inside { fill: var(--card); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 10px; }
.key { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 3px; vertical-align: -1px; }
.wide-figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 20px 28px; }
"""  # fmt: skip


def legend(names: Iterable[tuple[int, str]]) -> Html:
    """Returns a legend of names and the numbers of their colours."""
    keys = (element("span", element("span", class_=f"key m{number % NUM_COLOURS}"), name) for number, name in names)
    return element("div", *keys, class_="legend")


def bars(groups: Sequence[tuple[str, Sequence[tuple[int, str, float, float]]]], title: str) -> Html:
    """Draws groups of bars that lie: (name, bars of (number of the colour, what it is, share, half of its 95 % interval)), shares in [0, 1]."""
    y, drawn = 8, []
    height = 18 + sum(22 * len(of_group) + 12 for _, of_group in groups)
    for percent in range(0, 101, 20):
        x = BARS_AT + BARS_WIDTH * percent / 100
        drawn += [element("line", x1=x, x2=x, y1=4, y2=height - 18, class_="axis"), text(x, height - 4, f"{percent}", "tick", "middle")]
    for name, of_group in groups:
        drawn.append(text(NAME_END, y + 11 * len(of_group) + 4, _cut(name, 34), "name"))
        for colour, what, share, half in of_group:
            x = BARS_AT + BARS_WIDTH * share
            tip = element("title", f"{name}, {what}: {_points(share, half)}")
            left, right = (BARS_AT + BARS_WIDTH * min(max(end, 0), 1) for end in (share - half, share + half))
            whisker = [
                element("line", x1=f"{left:.1f}", x2=f"{right:.1f}", y1=y + 11, y2=y + 11, class_="whisker"),
                *(element("line", x1=f"{end:.1f}", x2=f"{end:.1f}", y1=y + 7, y2=y + 15, class_="whisker") for end in (left, right)),
            ]
            drawn.append(element("g", tip, bar(BARS_AT, y + 4, x - BARS_AT, f"m{colour % NUM_COLOURS}", BAR), *(whisker if half else [])))
            drawn.append(text(WIDTH, y + 16, _points(share, half), "end"))
            y += 22
        y += 12
    return svg(WIDTH, height, drawn, title)


def heat_map(lengths: Sequence[int], depths: Sequence[float], recall_LD: Sequence[Sequence[float]], title: str) -> Html:
    """Draws lengths from left to right and depths downwards; a cell is as blue as needles were found in it, and says how many percent."""
    wide, tall, left, top = max(34, min(60, 380 // len(lengths))), 24, 62, 4
    drawn = []
    for row, depth in enumerate(depths):
        drawn.append(text(left - 8, top + tall * row + 16, f"{depth:.0%}", "tick end"))
    for column, (length, of_length) in enumerate(zip(lengths, recall_LD, strict=True)):
        x = left + wide * column
        for row, (depth, recall) in enumerate(zip(depths, of_length, strict=True)):
            y = top + tall * row
            tip = element("title", f"{length:,} tokens, depth {depth:.0%}: {recall:.0%} found")
            cell = [element("rect", x=x, y=y, width=wide - 2, height=tall - 2, rx=3, class_="track")]
            cell.append(element("rect", x=x, y=y, width=wide - 2, height=tall - 2, rx=3, class_="kept", fill_opacity=f"{recall:.2f}"))
            cell.append(text(x + wide / 2 - 1, y + 15, f"{100 * recall:.0f}", "inside" if recall > 0.55 else "count", "middle"))
            drawn.append(element("g", tip, *cell))
        drawn.append(text(x + wide / 2 - 1, top + tall * len(depths) + 12, _tokens(length), "tick", "middle"))
    bottom = top + tall * len(depths) + 30
    drawn.append(text(left, bottom, "length in tokens \u2192; depth of the needle \u2193", "tick"))
    return svg(max(left + wide * len(lengths) + 10, 420), bottom + 6, drawn, title)


def dots(names: Sequence[str], series: Sequence[tuple[int, Sequence[tuple[int, float, float]]]], chance: float, title: str) -> Html:
    """Draws a place for each name, from left to right; `series`: number of a colour, points of (place, share, half of its 95 % interval)."""
    width, height, left, top = 420, 150, 34, 8
    ends = [chance, *(share + sign * half for _, points in series for _, share, half in points for sign in (-1, 1))]
    low, high = max(0.0, math.floor(20 * min(ends)) / 20), min(1.0, math.ceil(20 * max(ends)) / 20)
    at = lambda share: top + height * (high - share) / (high - low or 1)
    drawn = []
    for share in (low, (low + high) / 2, high):
        drawn += [element("line", x1=left, x2=width, y1=f"{at(share):.1f}", y2=f"{at(share):.1f}", class_="axis")]
        drawn += [text(left - 6, round(at(share) + 4, 1), f"{100 * share:.3g}", "tick end")]
    drawn.append(element("line", x1=left, x2=width, y1=f"{at(chance):.1f}", y2=f"{at(chance):.1f}", class_="chance"))
    step = (width - left) / len(names)
    for number, (colour, points) in enumerate(series):
        places = [place for place, *_ in points]
        for index, (place, share, half) in enumerate(points):
            same, before = places.count(place), places[:index].count(place)
            x = left + step * (place + (number + (before + 1) / (same + 1)) / len(series))
            tip = element("title", f"{names[place]}: {_points(share, half)}")
            top_end, bottom_end = (f"{at(end):.1f}" for end in (share + half, share - half))
            line = element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=top_end, y2=bottom_end, class_=f"l{colour % NUM_COLOURS}")
            dot = element("circle", cx=f"{x:.1f}", cy=f"{at(share):.1f}", r=3, class_=f"m{colour % NUM_COLOURS}")
            drawn.append(element("g", tip, line, dot))
    for place, name in enumerate(names):
        y = top + height + (14 if place % 2 == 0 or len(names) < 4 else 28)
        drawn.append(text(left + step * (place + 0.5), y, _cut(name, 22), "tick", "middle"))
    return svg(width, top + height + 34, drawn, title)


def curves(series: Sequence[Sequence[tuple[float, float]]], marks: Sequence[tuple[float, str]], unit: str, title: str) -> Html:
    """Draws lines of (step, value) in the colours of their numbers; `marks`: steps at which something begins, with its name."""
    width, height, left, top = 1040, 230, 52, 20
    points = [point for line in series for point in line]
    first, last = min(x for x, _ in [*points, *marks]), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1)
    across = lambda x: left + (width - left - 10) * ((x - first) / (last - first) if last > first else 0.5)
    down = lambda y: top + height * (high - y) / (high - low)
    drawn = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        value, x = low + share * (high - low), first + share * (last - first)
        drawn.append(element("line", x1=left, x2=width - 10, y1=f"{down(value):.1f}", y2=f"{down(value):.1f}", class_="axis"))
        drawn.append(text(left - 8, round(down(value) + 4, 1), f"{value:.3f}", "tick end"))
        drawn.append(text(across(x), top + height + 18, f"{x:,.0f}", "tick", "middle"))
    for x, name in marks:
        drawn.append(element("line", x1=f"{across(x):.1f}", x2=f"{across(x):.1f}", y1=top, y2=top + height, class_="chance"))
        drawn.append(text(across(x) + 4, top - 6, name, "tick"))
    for number, line in enumerate(series):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
        drawn.append(element("polyline", points=path, class_=f"curve l{number % NUM_COLOURS}"))
        drawn += [element("circle", cx=f"{across(x):.1f}", cy=f"{down(y):.1f}", r=2.4, class_=f"m{number % NUM_COLOURS}") for x, y in line]
    drawn.append(text(left, top + height + 36, f"{unit}, by step", "tick"))
    return svg(width, top + height + 42, drawn, title)


def _points(share: float, half: float) -> str:
    return f"{100 * share:.1f} \u00b1 {100 * half:.1f}" if half else f"{100 * share:.1f}"


def _tokens(number: int) -> str:
    return f"{number // 1024}K" if number >= 1024 and number % 1024 == 0 else f"{number / 1000:.3g}k" if number >= 10_000 else f"{number}"


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}\u2026"
