"""The report as one HTML page that loads nothing and runs nothing: text of documents is escaped, addresses are no links."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from herd_jax.curation.mix import HEADINGS
from herd_jax.curation.reporting import plots
from herd_jax.curation.reporting.data import CurationReport, Sample, Step
from herd_jax.curation.reporting.formats import percent, short
from herd_jax.curation.reporting.tables import Histogram
from herd_jax.page import layout
from herd_jax.page.layout import cell, code, flat, note, table
from herd_jax.page.markup import Html, element, join

MAX_ROWS = 100  # of a table that grows with the input


def page(report: CurationReport) -> str:
    sections = [
        ("Waterfall", _waterfall(report)),
        ("Reasons", _reasons(report)),
        ("Categories", _by(report, "category", report.tokens_by_category())),
        ("Streams", _by(report, "stream", report.tokens) if any(group.stream != group.category for group in report.clean.groups) else None),
        ("Languages", _by(report, "language", None)),
        ("Source types", _by(report, "source_type", None)),
        ("Topics", _by(report, "topic", None) if any(group.topic for group in report.clean.groups) else None),
        ("Lengths", _histograms(report.clean.lengths, "Characters of the clean documents, in octaves.", short)),
        ("Quality", _histograms(report.clean.qualities, "Score of the quality classifier.", lambda edge: f"{edge:g}")),
        ("Dropped samples", _samples(report)),
        ("Unreadable inputs", _problems(report)),
        ("Mix", _mix(report.mix) if report.mix else None),
        ("Contamination", _contamination(report.contamination) if report.contamination else None),
        ("Settings", _settings(report) if report.settings else None),
    ]
    return layout.page(f"Curation of {report.directory}", _header(report), [(title, body) for title, body in sections if body])


def _header(report: CurationReport) -> Html:
    documents = sum(group.documents for group in report.clean.groups)
    characters = sum(group.characters for group in report.clean.groups)
    seconds = sum(step.seconds or 0 for step in report.steps)
    numbers = [
        (f"{short(report.input_bytes)}B", f"in {report.num_inputs:,} input files"),
        (short(report.num_read), "documents read"),
        (short(documents), f"clean documents, {percent(documents, report.num_read)}"),
        (short(characters), "clean characters"),
        (short(sum(sum(parts.values()) for parts in report.tokens.values())), "tokens in streams") if report.tokens else None,
        (f"{report.num_read / seconds:,.0f}", "documents/s and core, all blocks") if seconds else None,
        (f"{len({problem['file'] for problem in report.problems}):,}", "unreadable inputs") if report.problems else None,
    ]
    cards = [element("div", element("b", number), element("span", label), class_="card") for number, label in filter(None, numbers)]
    phases = [element("span", str(phase), class_="chip open" if phase.unfinished else "chip") for phase in report.phases]
    if not report.is_finished:
        phases.append(element("span", "The run is not finished: this counts completed tasks alone.", class_="chip open"))
    remarks = [element("p", remark, class_="warning") for remark in report.remarks]
    title = element("h1", "Curation report", element("small", report.directory))
    return element("header", title, element("div", *phases, class_="chips"), element("div", *cards, class_="cards"), *remarks)


def _waterfall(report: CurationReport) -> Html | None:
    if not report.steps:
        return None
    is_timed = any(step.seconds for step in report.steps)
    rows = [
        (
            step.phase if before is None or step.phase != before.phase else "",
            code(step.block),
            step.documents,
            step.dropped,
            percent(step.dropped, step.documents) if step.dropped else "",
            step.kept,
            step.characters if step.has_text else plots.RAW,
            "" if step.characters_in is None else _change(step.characters, step.characters_in),
            "" if (tokens := report.tokens_of(step)) is None else f"~{short(tokens)}",
            *(_speed(step) if is_timed else ()),
        )
        for before, step in zip([None, *report.steps], report.steps)
    ]
    names = ["phase", "block", "in", "dropped", "", "kept", "characters kept", "", "tokens kept"]
    names += ["seconds", "documents/s"] if is_timed else []
    notes = ["Seconds are of one core, summed over tasks."] if is_timed else []
    if report.characters_per_token:
        notes.append(f"Tokens are estimated from characters: the streams have {report.characters_per_token:.2f} characters per token.")
    figure = element("div", plots.waterfall(report), class_="figure")
    return join([figure, table(names, rows), element("p", " ".join(notes), class_="note")])


def _mix(planned: dict) -> Html:
    """Shows what each phase draws of each category and source; of a run without a mix, why there is none."""
    if "unused" not in planned:  # there is none, or an older version made it
        return element("pre", planned["table"], class_="whole")
    parts = []
    for phase in planned["phases"]:
        title = f"From {short(phase['from_tokens'])} to {short(phase['to_tokens'])} tokens"
        rows = [(code(Path(label.strip()).name) if label.startswith(" ") else element("b", label), *cells) for label, *cells in phase["rows"]]
        parts += [element("h3", title), table(HEADINGS, rows), *(element("p", remark, class_="note") for remark in phase["remarks"])]
    return join([*parts, *(element("p", sentence, class_="note") for sentence in planned["unused"])])


def _speed(step: Step) -> tuple[str, str]:
    return ("", "") if step.seconds is None else (f"{step.seconds:,.1f}", f"{step.documents / step.seconds:,.0f}")


def _reasons(report: CurationReport) -> Html | None:
    reasons = report.reasons()
    total, most = sum(count for *_, count in reasons), max((count for *_, count in reasons), default=0)
    rows = [(code(block), code(reason), count, percent(count, total), _meter(count, most, "dropped")) for block, reason, count in reasons]
    return table(("block", "reason", "documents", "of all dropped", ""), rows) if rows else None


def _by(report: CurationReport, field: str, tokens: dict[str, dict[str, int]] | None) -> Html | None:
    """Shows the clean documents by a field of the groups, with their exact tokens or an estimate."""
    documents, characters, estimate = Counter(), Counter(), Counter()
    for group in report.clean.groups:
        key = getattr(group, field)
        documents[key] += group.documents
        characters[key] += group.characters
        estimate[key] += group.characters / report.characters_per_token if report.characters_per_token else 0
    read, total = report.read.get(field, {}), sum(characters.values())
    keys = sorted({*documents, *read}, key=lambda key: (-characters[key], -read.get(key, 0), key))
    rows = []
    for key in keys[:MAX_ROWS]:
        row = [code(key or "unknown")]
        row += [read.get(key, 0), percent(documents[key], read.get(key, 0))] if read else []
        row += [documents[key], characters[key]]
        if tokens is not None:
            row += [tokens.get(key, {}).get("train", ""), tokens.get(key, {}).get("validation", "")]
        elif report.characters_per_token:
            row.append(f"~{short(estimate[key])}")
        rows.append([*row, percent(characters[key], total), _meter(characters[key], max(characters.values(), default=0), "kept")])
    names = [field.replace("_", " "), *(["after reading", "of these clean"] if read else []), "clean documents", "characters"]
    names += ["tokens to train", "to validate"] if tokens is not None else ["tokens"] if report.characters_per_token else []
    more = element("p", f"and {len(keys) - MAX_ROWS:,} more, in report.json", class_="note") if len(keys) > MAX_ROWS else Html()
    return join([table([*names, "of all characters", ""], rows), more]) if rows else None


def _histograms(histograms: Iterable[Histogram], about: str, label: Callable[[float], str]) -> Html | None:
    figures = [
        element(
            "figure",
            element("figcaption", code(item.stream), note(f" {sum(item.counts):,} documents")),
            plots.histogram(item.edges, item.counts, label),
        )
        for item in histograms
    ]
    return join([element("div", *figures, class_="small-figures"), element("p", about, class_="note")]) if figures else None


def _samples(report: CurationReport) -> Html | None:
    drawn = []
    for step in report.steps:
        found = [sample for sample in report.samples if (sample.phase, sample.block) == (step.phase, step.block)]
        if not found:
            continue
        shown = []
        for reason, count in step.reasons.items():
            samples = [_sample(sample) for sample in found if sample.reason == reason]
            shown += [element("h4", code(reason), note(f" {len(samples)} of {count:,}")), *samples]
        drawn.append(element("details", element("summary", code(step.block), note(f" {len(found)} of {step.dropped:,} dropped")), *shown))
    return join(drawn) if drawn else None


def _sample(sample: Sample) -> Html:
    def side(label: str, identity: str, url: str, text: str) -> Html:
        title = element("div", element("b", label), " ", code(identity), element("div", url, class_="note"))
        return element("div", title, element("pre", text, dir="auto") if text else element("p", "no text", class_="note"))

    sides = [side("dropped", sample.id, sample.url, sample.text)]
    if sample.duplicate_of:
        sides.append(side("duplicates", *(sample.duplicate_of[name] for name in ("id", "url", "text"))))
    return element("article", *sides)


def _problems(report: CurationReport) -> Html | None:
    rows = [(code(problem["file"]), problem["reason"]) for problem in report.problems]
    more = element("p", f"and {len(rows) - MAX_ROWS:,} more, in report.json", class_="note") if len(rows) > MAX_ROWS else Html()
    return join([table(("file", "reason"), rows[:MAX_ROWS]), more]) if rows else None


def _settings(report: CurationReport) -> Html:
    rows = (element("tr", element("td", name), element("td", code(str(cell(value))))) for name, value in flat(report.settings))
    return element("details", element("summary", "config.json"), element("table", element("tbody", *rows), class_="pairs"))


def _contamination(rows: Sequence[dict[str, Any]]) -> Html:
    found = [{name.replace(".", " "): value for name, value in flat(row)} for row in rows]
    names = list(dict.fromkeys(name for row in found for name in row))
    return table(names, [[cell(row.get(name, "")) for name in names] for row in found])


def _change(after: float, before: float) -> str:
    return f"{after / before - 1:+.1%}".replace("-", "\u2212") if before and after != before else ""


def _meter(part: float, whole: float, kind: str) -> Html:
    return element("div", element("div", class_=kind, style=f"width:{100 * part / whole if whole else 0:.1f}%"), class_="meter")
