"""The way of one document through a curation run: where it was read, what it passed, where and why it went, or where it stands."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from herd_jax.curation.parquet import writable
from herd_jax.curation.reporting.data import document_at, dropped_files, read_phases, read_settings, read_steps
from herd_jax.errors import UserError

COLUMNS = ("url", "date", "source", "media_type", "language", "language_score", "category", "topic", "quality")


@dataclasses.dataclass
class Fate:
    """What became of a document. `read`, `clean`: the row of the document after the first phase and in the result, with its "place",
    TASK:PLACE or a path; `dropped`: its line in the log of drops, with its "phase". Each None where it is not there."""

    id: str
    read: dict[str, Any] | None = None
    dropped: dict[str, Any] | None = None
    clean: dict[str, Any] | None = None


def lines_of_document(directory: Path, wanted: str) -> list[str]:
    """Tells what happened to the document with this id, or to the documents with this URL. Raises UserError where there is none."""
    read_settings(directory)
    fates: dict[str, Fate] = {}
    for file, place, row in _rows(directory / "documents" / "read", "*.parquet", wanted):
        fates.setdefault(row["id"], Fate(row["id"])).read = row | {"place": f"{file.stem}:{place}"}
    for file in dropped_files(directory):
        for entry in _dropped(file, wanted):
            fates.setdefault(entry["id"], Fate(entry["id"])).dropped = entry | {"phase": file.parent.name}
    for file, _, row in _rows(directory / "clean", "*/*.parquet", wanted):
        fates.setdefault(row["id"], Fate(row["id"])).clean = row | {"place": str(file.relative_to(directory))}
    if not fates:
        open_phases = [str(phase) for phase in read_phases(directory) if phase.unfinished]
        still = f" yet ({', '.join(open_phases)})" if open_phases else ""
        raise UserError(f"no document of {directory} has the id or URL '{wanted}'{still}: ids stand in clean/ and dropped/, such as FILE#0")
    return [line for fate in fates.values() for line in [*_lines(directory, fate), ""]][:-1]


def _lines(directory: Path, fate: Fate) -> list[str]:
    known = fate.clean or fate.read or fate.dropped
    lines = [fate.id, *([_line("url", known["url"])] if known["url"] else [])]
    if fate.read:
        lines.append(_line("read", f"{_about(fate.read, COLUMNS[1:])}; place {fate.read['place']}"))
    steps = [(step.phase, step.block) for step in read_steps(directory)]
    if fate.dropped:
        here = (fate.dropped["phase"], fate.dropped["block"])
        lines += [_line("passed", ", ".join(block for _, block in steps[: steps.index(here)]) or "nothing")] if here in steps else []
        lines.append(_line("dropped", f"by {here[1]} in phase {here[0]}: {fate.dropped['reason']}"))
        if place := fate.dropped.get("duplicate_of"):
            kept = document_at(directory, place, ["id", "url"])
            lines.append(_line("duplicates", f"{kept['id']}  {kept['url']}" if kept else f"place {place}, whose file is gone"))
    elif fate.clean:
        lines.append(_line("passed", ", ".join(block for _, block in steps)))
        lines.append(_line("kept", f"in {fate.clean['place']}: {_about(fate.clean, COLUMNS[4:])}"))
    else:
        lines.append(_line("waits", "neither dropped nor clean: its task has not completed a later phase"))
    return lines


def _about(row: dict[str, Any], names: Iterable[str]) -> str:
    known = {name: row[name] for name in names if row.get(name) not in (None, "")}
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in known.items())


def _line(name: str, value: str) -> str:
    return f"  {name:<12}{value}"


def _rows(directory: Path, pattern: str, wanted: str) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Yields (file, place in it, row without the text) of the documents with this id or URL. Reads these two columns of all rows."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = writable(wanted)
    for path in sorted(directory.glob(pattern)):
        with pq.ParquetFile(path) as file:
            first = 0
            for group in range(file.num_row_groups):
                keys = file.read_row_group(group, columns=["id", "url"])
                matches = pc.or_kleene(pc.equal(keys["id"], wanted), pc.equal(keys["url"], wanted))
                places = pc.indices_nonzero(pc.fill_null(matches, False))
                if len(places):
                    names = ["id", *(name for name in COLUMNS if name in file.schema_arrow.names)]
                    found = file.read_row_group(group, columns=names).take(places).to_pylist()
                    yield from ((path, first + place, row) for place, row in zip(places.to_pylist(), found))
                first += len(keys)


def _dropped(file: Path, wanted: str) -> Iterator[dict[str, Any]]:
    needle = json.dumps(wanted).encode()  # with its quotes, as the log writes it
    with file.open("rb") as lines:
        for line in lines:
            if needle in line:
                entry = json.loads(line)
                if wanted in (entry["id"], entry["url"]):
                    yield entry
