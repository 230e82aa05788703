"""Pictures of what is planned: a schedule as text and as blocks, memory by kind, MFU over GPUs. The drawn ones need matplotlib."""

from pathlib import Path
from string import ascii_lowercase

import numpy as np

from herd_jax.errors import UserError
from herd_jax.page.figure import figure_file
from herd_jax.parallel.schedule import BACKWARD_INPUT, BACKWARD_LOWER, BACKWARD_UPPER, BACKWARD_WEIGHT, FORWARD, IDLE, Schedule

LINE_WIDTH = 120  # characters of a line of text
GIB = 2**30
KINDS = {  # operation -> name in the legend, colour map with a shade for each chunk
    FORWARD: ("forward", "Blues"),
    BACKWARD_UPPER: ("backward", "Oranges"),
    BACKWARD_INPUT: ("input gradient", "Oranges"),
    BACKWARD_WEIGHT: ("weight gradient", "Greens"),
}


def schedule_text(schedule: Schedule) -> list[str]:
    """Returns the lines of a picture for the terminal, a line for each rank and a cell for each tick, then what can be counted in it.

    A chunk is a letter, small in the forward, large in the backward; where the backward takes two ticks, `=` fills the second one.
    Raises UserError where there are more chunks than letters.
    """
    if schedule.num_chunks > len(ascii_lowercase):
        raise UserError(f"pipeline.num_chunks is {schedule.num_chunks} and the text has letters for 26: choose fewer, or draw a file")
    splits_backward = bool((schedule.operation == BACKWARD_WEIGHT).any())
    width = len(str(schedule.num_micro_batches - 1)) + 2 + splits_backward

    def cell(operation: int, micro_batch: int, chunk: int) -> str:
        if operation == BACKWARD_LOWER:
            return "=" * width
        letter = ascii_lowercase[chunk] if operation == FORWARD else ascii_lowercase[chunk].upper()
        mark = "*" if operation == BACKWARD_WEIGHT else " " * splits_backward
        return (" ." + mark if operation == IDLE else f"{micro_batch}{letter}{mark}").rjust(width)

    num_ticks, num_ranks = schedule.operation.shape
    labels = [f"rank {rank}".ljust(len(f"rank {num_ranks - 1}")) + " |" for rank in range(num_ranks)]
    ticks_per_line = (LINE_WIDTH - len(labels[0])) // width // 5 * 5
    lines = []
    for start in range(0, num_ticks, ticks_per_line):
        ticks = slice(start, start + ticks_per_line)
        numbers = [str(tick).rjust(width - splits_backward).ljust(5 * width) for tick in range(num_ticks)[ticks][::5]]
        lines.append(("tick".ljust(len(labels[0])) + "".join(numbers)).rstrip())
        for rank, label in enumerate(labels):
            row = zip(*(array[ticks, rank].tolist() for array in (schedule.operation, schedule.micro_batch, schedule.chunk)))
            lines.append(label + "".join(cell(*item) for item in row).rstrip())
        lines.append("")
    return [*lines, *_legend(schedule), "", *_counts(schedule)]


def _legend(schedule: Schedule) -> list[str]:
    lines = ["0a    forward of micro-batch 0"]
    if (schedule.operation == BACKWARD_UPPER).any():
        lines.append("0A=== its backward, two ticks: the upper half of the layers, then the lower")
    if (schedule.operation == BACKWARD_INPUT).any():
        lines += ["0A    gradient of the inputs", "0A*   gradient of the weights"]
    if schedule.num_chunks > 1:
        lines.append(f"a..{ascii_lowercase[schedule.num_chunks - 1]}  chunks of a rank, in the order of its stages")
    return lines + [".     idle"]


def _counts(schedule: Schedule) -> list[str]:
    lines = [f"{len(schedule.operation)} ticks, bubble {schedule.bubble_fraction:.1%} (idle over busy)"]
    for rank, (stages, peak) in enumerate(zip(_stages(schedule), schedule.peak_in_flight)):
        lines.append(f"rank {rank}: {_stages_text(stages)}; peak in flight {peak}")
    return lines + ["in flight: micro-batches whose activations a rank holds, each counted once for each of its chunks"]


def _stages(schedule: Schedule) -> list[list[int]]:
    """Returns the stages of each rank, by chunk."""
    return [[chunk * schedule.num_ranks + rank for chunk in range(schedule.num_chunks)] for rank in range(schedule.num_ranks)]


def _stages_text(stages: list[int]) -> str:
    return f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"


def draw_schedule(schedule: Schedule, path: str | Path) -> None:
    """Draws a lane for each rank and a block for each operation, with the micro-batch's number in it where it fits, to a .png or .svg file.

    Raises UserError where matplotlib is missing or the file cannot be made.
    """
    num_ticks, num_ranks = schedule.operation.shape
    tick_inches = np.clip(15 / num_ticks, 0.1, 0.3) if num_ticks > 20 else 6 / num_ticks
    with figure_file(path, 2 + num_ticks * tick_inches, 1.4 + 0.36 * num_ranks) as figure:
        axes = figure.add_subplot()
        digits = len(str(schedule.num_micro_batches - 1))
        font_size = min(9, 72 * tick_inches / (0.7 * digits + 0.3))
        colour = {kind: _shades(KINDS[kind][1], schedule.num_chunks) for kind in KINDS if (schedule.operation == kind).any()}
        for rank in range(num_ranks):
            axes.broken_barh([(0, num_ticks)], (rank - 0.43, 0.86), facecolor="#f0f0f0")
            blocks = [(tick, kind) for tick, kind in enumerate(schedule.operation[:, rank].tolist()) if kind in KINDS]
            spans = [(tick, 2 if kind == BACKWARD_UPPER else 1) for tick, kind in blocks]
            fills = [colour[kind][schedule.chunk[tick, rank]] for tick, kind in blocks]
            axes.broken_barh(spans, (rank - 0.43, 0.86), facecolors=fills, edgecolor="white", linewidth=min(0.8, 4 * tick_inches))
            for (tick, length), fill in zip(spans if font_size >= 4 else [], fills):
                text = str(schedule.micro_batch[tick, rank])
                axes.text(tick + length / 2, rank, text, ha="center", va="center_baseline", fontsize=font_size, color=_ink(fill))
        axes.set(xlim=(0, num_ticks), ylim=(num_ranks - 0.5, -0.5), xlabel="tick")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yticks(range(num_ranks), [f"rank {rank}: {_stages_text(stages)}" for rank, stages in enumerate(_stages(schedule))])
        held = axes.secondary_yaxis("right")
        held.set_yticks(range(num_ranks), [f"{peak} in flight" for peak in schedule.peak_in_flight])
        for side in (axes, held):
            side.tick_params(axis="y", length=0)
            side.spines[:].set_visible(False)
        axes.set_title(f"{schedule.num_micro_batches} micro-batches, {num_ticks} ticks, bubble {schedule.bubble_fraction:.1%}", loc="left")
        for chunk in range(schedule.num_chunks):
            for kind, fills in colour.items():
                name = KINDS[kind][0] + (f", chunk {chunk}" if schedule.num_chunks > 1 else "")
                axes.barh(0, 0, color=fills[chunk], label=name)
        columns = schedule.num_chunks if schedule.num_chunks > 1 else len(colour)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)


def draw_memory(memory_bytes: dict[str, float], capacity_bytes: float, path: str | Path) -> None:
    """Draws bytes of one device by kind as one stacked bar against its capacity, to a .png or .svg file; an entry `total` is left out.

    Raises UserError where matplotlib is missing or the file cannot be made.
    """
    kinds = {kind: size / GIB for kind, size in memory_bytes.items() if kind != "total"}
    total, capacity = sum(kinds.values()), capacity_bytes / GIB
    right = 1.05 * max(total, capacity)
    with figure_file(path, 9, 2.4) as figure:
        axes = figure.add_subplot()
        left = 0.0
        for (kind, size), colour in zip(kinds.items(), _distinct("Set2", len(kinds))):
            axes.barh(0, size, left=left, height=0.6, color=colour, edgecolor="white", label=f"{kind} {size:,.1f} GiB")
            if size > 0.06 * right:
                axes.text(left + size / 2, 0, f"{size:,.1f}", ha="center", va="center_baseline", color=_ink(colour))
            left += size
        axes.axvline(capacity, color="#c00000", linestyle="--")
        axes.text(capacity, 0.36, " capacity ", ha="right" if capacity > right / 2 else "left", va="bottom", color="#c00000")
        verdict = f"{capacity - total:,.1f} GiB to spare" if total <= capacity else f"{total - capacity:,.1f} GiB too much"
        axes.set_title(f"Memory of one device: {total:,.1f} of {capacity:,.1f} GiB, {verdict}", loc="left")
        axes.set(xlim=(0, right), ylim=(-0.4, 0.6), yticks=[], xlabel="GiB")
        axes.spines[["left", "right", "top"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)


def draw_mfu(points: list[tuple[int, float, str]], path: str | Path) -> None:
    """Draws (number of GPUs, MFU from 0 to 1, label) to a .png or .svg file; points of the same label are joined.

    Raises UserError where matplotlib is missing or the file cannot be made.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for num_gpus, mfu, label in points:
        series.setdefault(label, []).append((num_gpus, 100 * mfu))
    with figure_file(path, 8, 4) as figure:
        axes = figure.add_subplot()
        for i, ((label, values), colour) in enumerate(zip(series.items(), _distinct("Dark2", len(series)))):
            axes.plot(*zip(*sorted(values)), marker="osD^v"[i % 5], color=colour, label=label, linewidth=1)
        columns = sorted({num_gpus for num_gpus, _, _ in points})
        for num_gpus in columns:
            for i, percent in enumerate(sorted({100 * mfu for at, mfu, _ in points if at == num_gpus})):
                side, offset = ("left", 9) if i % 2 else ("right", -9)  # neighbours on different sides
                place = dict(xytext=(offset, 0), textcoords="offset points", ha=side, va="center_baseline")
                behind = dict(facecolor="white", edgecolor="none", pad=0.5)
                axes.annotate(f"{percent:.1f}%", (num_gpus, percent), fontsize=8, bbox=behind, **place)
        axes.set_xscale("log", base=2)
        axes.set_xticks(columns, [f"{num_gpus:,}" for num_gpus in columns])
        axes.margins(x=0.2, y=0.25)
        axes.set(xlabel="GPUs", ylabel="MFU (%)")
        axes.set_title("Model FLOPs utilisation", loc="left")
        axes.grid(axis="y", color="#e0e0e0")
        axes.set_axisbelow(True)
        axes.spines[["right", "top"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)


def _shades(colour_map: str, count: int) -> list[tuple[float, ...]]:
    """Returns `count` colours from light to dark."""
    from matplotlib import colormaps

    return [colormaps[colour_map](x) for x in (np.linspace(0.25, 0.7, count) if count > 1 else [0.45])]


def _distinct(colour_map: str, count: int) -> list[tuple[float, ...]]:
    """Returns `count` colours of a map that has eight, from the first again after the last."""
    from matplotlib import colormaps

    return [colormaps[colour_map](i % 8) for i in range(count)]


def _ink(fill: tuple[float, ...]) -> str:
    """Returns the colour of text that can be read on a colour."""
    return "white" if np.dot(fill[:3], (0.3, 0.6, 0.1)) < 0.55 else "black"
