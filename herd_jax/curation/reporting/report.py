"""`inspect`: what a curation run kept, what it dropped and why, as a page, as JSON and as text; or the fate of one document."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

from herd_jax.curation.reporting.data import CurationReport, collect
from herd_jax.curation.reporting.fate import lines_of_document
from herd_jax.curation.reporting.formats import percent, printable, short
from herd_jax.curation.reporting.page import page
from herd_jax.curation.reporting.plots import RAW
from herd_jax.files import user_path, write_whole

BAR = 24  # characters
REASONS = 10


def inspect(directory: Path, document: str | None = None) -> str:
    """Writes report.html and report.json into a curation workdir and returns the text to print. With `document`, an id or URL, writes
    nothing and returns what happened to it.

    Needs no more memory than a row group of the run's files, some samples of each reason and a count for each group of documents.
    Raises UserError where the directory is no curation workdir or holds no such document.
    """
    directory = user_path(directory)
    if document is not None:
        return "\n".join(map(printable, lines_of_document(directory, document)))
    report = collect(directory)
    write_whole(directory / "report.html", page(report))
    write_whole(directory / "report.json", json.dumps(to_dict(report), indent=1))
    return "\n".join(map(printable, [*lines(report), f"page: {directory / 'report.html'}"]))


def to_dict(report: CurationReport) -> dict:
    """Returns the report for JSON, with what follows from it."""
    values = dataclasses.asdict(report) | {"is_finished": report.is_finished}
    for step, written in zip(report.steps, values["steps"], strict=True):
        written |= {"kept": step.kept, "estimated_tokens": report.tokens_of(step)}
    return values


def lines(report: CurationReport) -> list[str]:
    """Returns the waterfall, the most frequent reasons and the result by category, as aligned text."""
    state = ", ".join(map(str, report.phases)) or "nothing has run yet"
    found = [f"curation {report.directory}: {state}", *report.remarks, ""]
    if report.steps:
        found += [*_waterfall(report), ""]
    if reasons := report.reasons():
        total = sum(count for *_, count in reasons)
        rows = [("dropped by", "reason", "documents", "of all dropped")]
        rows += [(block, reason, f"{count:,}", percent(count, total)) for block, reason, count in reasons[:REASONS]]
        found += [*_aligned(rows, "<<>>"), ""]
        if len(reasons) > REASONS:
            found[-1:] = [f"and {len(reasons) - REASONS} more reasons", ""]
    if report.clean.groups:
        found += [*_categories(report), ""]
    if report.problems:
        first = report.problems[0]
        num_files = len({problem["file"] for problem in report.problems})
        found += [f"inputs that could not be read: {num_files}, the first {first['file']}: {first['reason']}", ""]
    return found


def _waterfall(report: CurationReport) -> list[str]:
    rows = [("phase", "block", "documents in", "dropped", "", "kept", "", "characters", "tokens", "seconds", "documents/s")]
    phase = None
    for step in report.steps:
        tokens, share = report.tokens_of(step), step.kept / report.num_read if report.num_read else 0
        rows.append(
            (
                step.phase if step.phase != phase else "",
                step.block,
                f"{step.documents:,}",
                f"{step.dropped:,}",
                percent(step.dropped, step.documents) if step.dropped else "",
                f"{step.kept:,}",
                "\u2588" * round(BAR * share) or "\u258f",
                short(step.characters) if step.has_text else RAW,
                "" if tokens is None else f"~{short(tokens)}",
                "" if step.seconds is None else f"{step.seconds:,.1f}",
                "" if step.seconds is None else f"{step.documents / step.seconds:,.0f}",
            )
        )
        phase = step.phase
    return _aligned(rows, "<<>>>><>>>>")


def _categories(report: CurationReport) -> list[str]:
    documents, characters = Counter(), Counter()
    for group in report.clean.groups:
        documents[group.category] += group.documents
        characters[group.category] += group.characters
    total, tokens = sum(characters.values()), report.tokens_by_category()
    rows = [("category", "clean documents", "characters", "", "tokens to train", "to validate")]
    for category in sorted(documents, key=lambda name: (-characters[name], name)):
        parts = tokens.get(category, {})
        shown = [f"{parts[part]:,}" if part in parts else "" for part in ("train", "validation")]
        rows.append((category, f"{documents[category]:,}", f"{characters[category]:,}", percent(characters[category], total), *shown))
    return _aligned(rows, "<>>>>>")


def _aligned(rows: list[tuple[str, ...]], sides: str) -> list[str]:
    """Returns rows of equally wide columns; those that are empty throughout are left out."""
    columns = [(column, side) for column, side in zip(zip(*rows, strict=True), sides, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column, _ in columns]
    cells = [[f"{text:{side}{width}}" for text in column] for (column, side), width in zip(columns, widths)]
    return ["  ".join(line).rstrip() for line in zip(*cells)]
