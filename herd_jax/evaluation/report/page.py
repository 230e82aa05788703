"""The report as one HTML page that loads nothing and runs nothing; several models stand side by side in it."""

from collections.abc import Sequence
from typing import Any

from herd_jax.evaluation.contamination.gain import SHARES
from herd_jax.evaluation.report import plots
from herd_jax.evaluation.report.data import EvaluationReport, ModelRecords
from herd_jax.page import layout
from herd_jax.page.layout import cell, code, flat, table
from herd_jax.page.markup import Html, element, join

RUN, NEEDLE, MULTI_NEEDLE, ROBUSTNESS = "run", "needle", "multi-needle", "robustness"
DRAWN = (RUN, NEEDLE, MULTI_NEEDLE, ROBUSTNESS)
CURVES = 6  # drawn of the sources, those with most points; the table has all


def page(report: EvaluationReport) -> str:
    models = report.models
    sections = [
        ("Benchmarks", _benchmarks(models)),
        ("Comparison", join(map(_comparison, report.comparisons))),
        ("Needles", _needles(models)),
        ("Robustness", _robustness(models)),
        ("Contamination", join(map(_contamination, report.contamination))),
        ("Validation loss", join(map(_validation, models))),
        ("Stage gates", join(_decisions(model, len(models) > 1) for model in models)),
        ("Other results", _others(models)),
        ("Settings", _settings(report)),
    ]
    name = ", ".join(model.name for model in models) or "evaluation"
    return layout.page(f"Evaluation of {name}", _header(report), [(title, body) for title, body in sections if body], plots.STYLE)


def benchmark_rows(model: ModelRecords) -> list[dict[str, Any]]:
    """Returns a row for each metric of each task of `run`: "task", "metric", "score" with its "stderr" and "half_interval" (of 95 %; None
    where it is no share of the items), "num_items", "num_shots"."""
    return [
        {"task": task, "metric": metric, "score": found["value"], "stderr": found["stderr"], "half_interval": found["interval"]}
        | {"num_items": of_task["items"], "num_shots": of_task["shots"]}
        for task, of_task in model.records.get(RUN, {}).get("results", {}).items()
        for metric, found in of_task["metrics"].items()
        if found["value"] is not None  # what was no finite number
    ]


def _header(report: EvaluationReport) -> Html:
    cards = []
    for model in report.models:
        tasks, needle = {row["task"] for row in benchmark_rows(model)}, model.records.get(NEEDLE)
        facts = [(f"{len(tasks)}", "benchmarks")] if tasks else []
        if needle:
            facts.append((f"{needle['results']['mean']:.1%}", f"needles found up to {max(needle['results']['lengths']):,} tokens"))
        if model.decisions:
            last = model.decisions[-1]
            facts.append((f"{last['seq_len']:,}", f"tokens, stage {last['stage']}: {last['verdict']}"))
        of = f" \u00b7 {model.name}" if len(report.models) > 1 else ""
        cards += [element("div", element("b", number), element("span", label + of), class_="card") for number, label in facts]
    chips = [element("span", f"{model.name}: {model.path}", class_="chip") for model in report.models]
    title = element("h1", "Evaluation report", element("small", ", ".join(model.name for model in report.models)))
    return element("header", title, element("div", *chips, class_="chips"), element("div", *cards, class_="cards"))


def _benchmarks(models: Sequence[ModelRecords]) -> Html | None:
    found: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for number, model in enumerate(models):
        for row in benchmark_rows(model):
            found.setdefault((row["task"], row["metric"]), []).append((number, row))
    if not found:
        return None
    groups, lines = [], []
    for (task, metric), rows in sorted(found.items()):
        shares = [(number, row["score"], row["half_interval"]) for number, row in rows if row["half_interval"] is not None]
        if shares:
            groups.append((f"{task} {metric}", [(number, models[number].name, score, half) for number, score, half in shares]))
        lines += [[code(task), metric, models[number].name, *_benchmark_cells(row)] for number, row in rows]
    shown = {number: models[number].name for rows in found.values() for number, _ in rows}
    keys = [plots.legend(sorted(shown.items()))] if len(models) > 1 else []
    figure = [element("div", plots.bars(groups, "Scores of the benchmarks with their 95 % intervals"), class_="figure")] if groups else []
    names = ("task", "metric", "model", "shots", "items", "score, 95 %", "standard error")
    about = (
        "Scores in percent, intervals 1.96 \u221a(S (1 \u2212 S) / N); of what is no share of the items the value itself. "
        "Standard errors are the harness's."
    )
    return join([*keys, *figure, table(names, lines), element("p", about, class_="note")])


def _benchmark_cells(row: dict[str, Any]) -> list[Any]:
    half, stderr = row["half_interval"], row["stderr"]
    if half is None:
        score, error = f"{row['score']:.4g}", "" if stderr is None else f"{stderr:.2g}"
    else:
        score, error = f"{100 * row['score']:.1f} \u00b1 {100 * half:.1f}", "" if stderr is None else f"{100 * stderr:.1f}"
    counts = ["" if row[key] is None else row[key] for key in ("num_shots", "num_items")]
    return [*counts, score, error]


def _comparison(record: dict[str, Any]) -> Html:
    first, second = record["settings"]["names"]
    rows = []
    for task, found in record["results"].items():
        scores = [f"{100 * score:.1f}" for score in found["scores"]]
        difference = f"{100 * found['difference']:+.1f} \u00b1 {100 * found['half_interval']:.1f}".replace("-", "\u2212")
        verdict = "differs" if found["is_significant"] else ""
        tests = [found["wins"], found["losses"], f"{found['p']:.2g}", f"{found['p_holm']:.2g}", verdict]
        rows.append([code(task), found["num_items"], *scores, difference, *tests])
    names = ("task", "items", first, second, "difference, 95 %", "won", "lost", "p", "p, Holm", "")
    tests = "p: exact McNemar for scores of 0 and 1, else flips of signs; Holm: for all tests at once."
    about = f"Difference: {second} less {first}, on the same items. {tests}"
    return join([table(names, rows), element("p", about, class_="note")])


def _needles(models: Sequence[ModelRecords]) -> Html | None:
    figures, rows = [], []
    for model in models:
        if record := model.records.get(NEEDLE):
            found = record["results"]
            caption = element("figcaption", element("b", model.name), f": {found['mean']:.1%} of {found['num_items']:,} needles found")
            drawn = plots.heat_map(found["lengths"], found["depths"], found["recall"], f"Needles found by length and depth, {model.name}")
            figures.append(element("figure", caption, drawn))
        if record := model.records.get(MULTI_NEEDLE):
            found = record["results"]
            by_length = zip(found["lengths"], found["recall"], strict=True)
            shares = "; ".join(f"{length:,}: {100 * share:.1f}" for length, share in by_length)
            rows.append([model.name, found["num_items"], f"{100 * found['mean']:.1f} \u00b1 {100 * found['half_interval']:.1f}", shares])
    parts = [element("div", *figures, class_="wide-figures")] if figures else []
    if rows:
        names = ("model", "prompts", "mean recall, %", "by length in tokens")
        parts += [element("h4", "Multi-needle: two of four asked for"), table(names, rows)]
    return join(parts) if parts else None


def _robustness(models: Sequence[ModelRecords]) -> Html | None:
    found = {number: model.records[ROBUSTNESS]["results"] for number, model in enumerate(models) if ROBUSTNESS in model.records}
    if not found:
        return None
    parts = [plots.legend((number, models[number].name) for number in found)] if len(models) > 1 else []
    for task in dict.fromkeys(task for results in found.values() for task in results):
        studies = {number: results[task]["studies"] for number, results in found.items() if task in results}
        figures, rows = [], []
        for study in next(iter(studies.values())):
            of_study = {number: of_model[study] for number, of_model in studies.items()}
            figures.append(element("figure", element("figcaption", element("b", study)), _dots(of_study, f"{task}, {study}: accuracy")))
            for number, one in of_study.items():
                numbers = [f"{100 * one[key]:.1f}" for key in ("mean", "spread", "standard_deviation", "unchanged")]
                rows.append([study, models[number].name, len(one["variants"]), *numbers])
        columns = ("study", "model", "variants", "mean accuracy, %", "largest less smallest", "standard deviation", "answered alike, %")
        parts += [element("h4", code(task)), element("div", *figures, class_="wide-figures"), table(columns, rows)]
    return join([*parts, element("p", "Dotted: chance. Lines: 95 % intervals.", class_="note")])


def _dots(of_study: dict[int, dict[str, Any]], title: str) -> Html:
    """Draws a study by the number of each model. Orders of the answers, of which there are many, share a place by how many choices they move."""
    variants = next(iter(of_study.values()))["variants"]
    name_of = (lambda row: row["name"]) if len(variants) <= 8 else (lambda row: f"{row['distance']} moved")
    names = list(dict.fromkeys(map(name_of, variants)))
    series = [
        (number, [(names.index(name_of(row)), row["accuracy"], row["half_interval"]) for row in one["variants"]])
        for number, one in of_study.items()
    ]
    return plots.dots(names, series, 1 / len(variants[0]["places"]), title)


def _contamination(record: dict[str, Any]) -> Html:
    models = list(record["settings"]["scores"])
    rows = []
    for task, found in record["results"].items():
        covered = [f"{found['items_at'][share] / found['num_items']:.1%}" for share in SHARES]
        has_threshold = found["threshold"] is not None
        threshold, share = (f"{found['threshold']:g}", f"{found['contaminated']:.1%}") if has_threshold else ("\u2013", "\u2013")
        gains = [_gain(found["gains"].get(model)) for model in models]
        rows.append([code(task), found["num_items"], f"{found['mean_coverage']:.1%}", *covered, threshold, share, *gains])
    names = ["task", "items", "coverage", "\u2265 0.2", "\u2265 0.5", "\u2265 0.8", "all of it", "T_D", "contaminated"]
    names += [f"gain of {model}" for model in models]
    about = (
        "Coverage: the share of an item's words in 8-grams that the training streams hold. T_D: the threshold with the largest significant "
        "gain, where there is one; gain: the score of all items less that of the clean ones, in points, * where it is significant."
    )
    streams = "Streams: " + ", ".join(record["settings"]["streams"])
    return join([table(names, rows), element("p", about, class_="note"), element("p", streams, class_="note")])


def _gain(gain: dict[str, Any] | None) -> str:
    return "\u2013" if gain is None else f"{100 * gain['gain']:+.1f}{'*' if gain['is_significant'] else ''}".replace("-", "\u2212")


def _validation(model: ModelRecords) -> Html:
    if not model.validation:
        return Html()
    rows, marks, before = [], [], 0
    for stage, of_stage in model.validation.items():
        marks += [(before, stage)] if stage else []
        rows += [row | {"step": before + row["step"], "stage": stage} for row in of_stage]
        before = rows[-1]["step"]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "stage")))
    sources = [name for name in names if "/" in name]
    drawn = sorted(sources, key=lambda name: -sum(name in row for row in rows))[:CURVES] or [names[-1]]
    series = [[(row["step"], row[name]) for row in rows if name in row] for name in drawn]
    unit = "bits per byte" if "bits_per_byte" in drawn[0] else "nats per token"
    short = {name: name.split("/", 1)[1] if "/" in name else name.removeprefix("val_").replace("_", " ") for name in names}
    lines = [[row["stage"], row["step"], *(f"{row[name]:.4f}" if name in row else "" for name in names)] for row in rows]
    heads = ["stage", "step", *(short[name] for name in names)]
    if not marks:
        lines, heads = [line[1:] for line in lines], heads[1:]
    return join(
        [
            element("h4", model.name),
            plots.legend((number, short[name]) for number, name in enumerate(drawn)),
            element("div", plots.curves(series, marks, unit, f"Validation loss of {model.name}"), class_="figure"),
            element("details", element("summary", "All validations"), table(heads, lines)),
        ]
    )


def _decisions(model: ModelRecords, is_named: bool) -> Html:
    if not model.decisions:
        return Html()
    rows = []
    for line in model.decisions:
        before = line["short_loss_before"]
        losses = ["" if before is None else f"{before:.4f}", f"{line['short_loss']:.4f}"]
        found = [share for row in line["needle_recall"].values() for share in row.values()]
        worst = f"{min(found):.0%}" if found else ""
        trained = [line[key] for key in ("stage", "seq_len", "steps", "tokens")]
        rows.append([*trained, *losses, worst, element("b", line["verdict"]), line["reason"]])
    names = ("stage", "length", "steps", "tokens", "short loss before", "short loss", "worst needle", "verdict", "reason")
    last, figure = model.decisions[-1]["needle_recall"], Html()
    if last:
        depths = [float(depth) for depth in next(iter(last.values()))]
        recall = [list(row.values()) for row in last.values()]
        drawn = plots.heat_map(list(map(int, last)), depths, recall, f"Needles found at the last gate of {model.name}")
        figure = join([element("h4", "Needles at the last gate"), element("div", element("figure", drawn), class_="wide-figures")])
    return join([*([element("h4", model.name)] if is_named else []), table(names, rows), figure])


def _others(models: Sequence[ModelRecords]) -> Html | None:
    parts = [
        element("details", element("summary", f"{model.name}: {command}"), _pairs(record["results"]))
        for model in models
        for command, record in model.records.items()
        if command not in DRAWN
    ]
    return join(parts) if parts else None


def _settings(report: EvaluationReport) -> Html | None:
    records = [(f"{model.name}: {command}", record) for model in report.models for command, record in model.records.items()]
    records += [(record["command"], record) for record in [*report.contamination, *report.comparisons]]
    return join(element("details", element("summary", name), _pairs(record["settings"])) for name, record in records) if records else None


def _pairs(values: dict[str, Any]) -> Html:
    rows = (element("tr", element("td", name), element("td", code(str(cell(value))))) for name, value in flat(values))
    return element("table", element("tbody", *rows), class_="pairs")
