"""What a curation workdir tells of its run: phases, the waterfall of blocks, samples of what they dropped, streams. Read-only, and of the
completed tasks alone, so it may be asked while the run goes on."""

import dataclasses
import heapq
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import xxhash

from herd_jax.curation.reporting.tables import Clean, count_clean, count_read
from herd_jax.data.streams import HEADER, TokenStream
from herd_jax.errors import UserError

JUDGING = ("read", "filter", "publish")  # the phases whose blocks keep or drop documents, in order, as far as a run has them
EXTRACTION = "extraction"  # the block that makes text of markup: before it, characters are no measure of tokens
SAMPLES = 4  # of each reason of each block
DUPLICATE_CHARACTERS = 2000  # shown of the document that a sample duplicates
_HAS_TEXT = b', "text": "'  # in a line of JSON; a quote inside of a string has a backslash


@dataclasses.dataclass(frozen=True)
class Phase:
    name: str
    completed: int  # tasks
    unfinished: int

    def __str__(self) -> str:
        return f"{self.name} unfinished ({self.completed} of {self.completed + self.unfinished} tasks done)" if self.unfinished else f"{self.name} done"


@dataclasses.dataclass(frozen=True)
class Step:
    """What a block did: documents that came in and went, characters of text before (None: not known) and after, seconds over all tasks
    (None: not measured). `has_text`: the characters after are of text and not of markup."""

    phase: str
    block: str
    documents: int
    dropped: int
    characters_in: int | None
    characters: int
    seconds: float | None
    reasons: dict[str, int]
    has_text: bool

    @property
    def kept(self) -> int:
        return self.documents - self.dropped


@dataclasses.dataclass(frozen=True)
class Sample:
    """A dropped document; `duplicate_of` is the id, url and beginning of the text of the one that stayed in its place."""

    phase: str
    block: str
    reason: str
    id: str
    url: str
    text: str
    duplicate_of: dict[str, str] | None


@dataclasses.dataclass(frozen=True)
class CurationReport:
    """What is known of a run. `tokens`: of each stream, by name and part. `characters_per_token`: over all streams, None without any. `read`:
    documents after the first phase, by language and by source type. `remarks`: what could not be read of the workdir itself."""

    directory: str
    phases: list[Phase]
    steps: list[Step]
    samples: list[Sample]
    read: dict[str, dict[str, int]]
    clean: Clean
    tokens: dict[str, dict[str, int]]
    characters_per_token: float | None
    problems: list[dict[str, str]]
    mix: Any
    contamination: Any
    settings: dict[str, Any]
    num_inputs: int
    input_bytes: int
    remarks: list[str]

    @property
    def is_finished(self) -> bool:
        """Returns whether the run has made its mix, which it makes last."""
        return self.mix is not None and not any(phase.unfinished for phase in self.phases)

    @property
    def num_read(self) -> int:
        return self.steps[0].documents if self.steps else 0

    def tokens_by_category(self) -> dict[str, dict[str, int]]:
        """Returns the tokens of each part of the streams by category, which may have several streams."""
        tokens: dict[str, dict[str, int]] = {}
        for stream, category in sorted({(group.stream, group.category) for group in self.clean.groups}):
            for part, count in self.tokens.get(stream, {}).items():
                parts = tokens.setdefault(category, {})
                parts[part] = parts.get(part, 0) + count
        return tokens

    def tokens_of(self, step: Step) -> float | None:
        """Estimates the tokens after a step from the characters per token of the streams."""
        return step.characters / self.characters_per_token if self.characters_per_token and step.has_text else None

    def reasons(self) -> list[tuple[str, str, int]]:
        """Returns (block, reason, documents), the most frequent first."""
        found = [(step.block, reason, count) for step in self.steps for reason, count in step.reasons.items()]
        return sorted(found, key=lambda row: (-row[2], *row[:2]))


def collect(directory: Path) -> CurationReport:
    """Collects what the files of a run say. Raises UserError where the directory is no curation workdir."""
    settings = read_settings(directory)
    phases, steps = read_phases(directory), read_steps(directory)
    clean = count_clean(directory / "clean")
    tokens, remarks = _tokens(directory / "streams")
    streams = {stream: sum(parts.values()) for stream, parts in tokens.items() if parts.get("train")}
    characters = sum(group.characters for group in clean.groups if group.stream in streams)
    return CurationReport(
        directory=str(directory),
        phases=phases,
        steps=steps,
        samples=_samples(directory, steps),
        read=count_read(directory / "documents" / "read"),
        clean=clean,
        tokens=tokens,
        characters_per_token=characters / sum(streams.values()) if characters else None,
        problems=[problem for file in sorted((directory / "problems").glob("*.json")) for problem in _json(file)],
        mix=_json(directory / "mix.json"),
        contamination=_json(directory / "contamination.json"),
        settings=settings["config"],
        num_inputs=len(settings["inputs"]),
        input_bytes=sum(settings["inputs"].values()),
        remarks=remarks,
    )


def read_settings(directory: Path) -> dict[str, Any]:
    """Returns the "config" of the run and its "inputs", bytes by file. Raises UserError where the directory is no curation workdir."""
    settings = _json(directory / "config.json")
    if not isinstance(settings, dict) or not {"config", "inputs"} <= settings.keys():
        what = "has no config.json of a run" if directory.is_dir() else "does not exist"
        raise UserError(f"{directory} is no curation workdir, it {what}: give the directory that --config.workdir named")
    return settings


def read_phases(directory: Path) -> list[Phase]:
    """Returns the phases in the order of the run."""
    found = []
    for name, num_tasks in (_json(directory / "phases" / "tasks.json") or {}).items():
        completed = len(list((directory / "phases" / name / "completions").glob("*")))
        found.append(Phase(name, completed, num_tasks - completed))
    return found


def read_steps(directory: Path) -> list[Step]:
    """Returns the blocks in the order in which documents meet them, summed over the completed tasks."""
    steps: list[Step] = []
    tasks_before = None
    for phase in JUDGING:
        totals: dict[tuple[int, str], dict[str, float]] = {}
        tasks = sorted(file.name for file in (directory / "phases" / phase / "completions").glob("*"))
        for task in tasks:
            for position, step in enumerate(_json(directory / "phases" / phase / "stats" / f"{task}.json")):
                counts = {name: _total(metric) for name, metric in step["stats"].items()} | {"seconds": _total(step["time_stats"])}
                if "total" in counts:
                    total = totals.setdefault((position, step["name"].split(": ", 1)[-1]), defaultdict(float))
                    for name, count in counts.items():
                        total[name] += count
        for number, ((_, block), total) in enumerate(sorted(totals.items())):
            joins = steps and (number > 0 or tasks == tasks_before)  # of an unfinished phase, fewer documents come in than were sent
            reasons = {name.removeprefix("dropped_"): int(count) for name, count in total.items() if name.startswith("dropped_")}
            steps.append(
                Step(
                    phase,
                    block,
                    documents=int(total["total"]),
                    dropped=int(total["dropped"]),
                    characters_in=steps[-1].characters if joins else None,
                    characters=int(total["doc_len"]),
                    seconds=total["seconds"] or None,
                    reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
                    has_text=True,
                )
            )
        tasks_before = tasks
    first_of_text = next((number for number, step in enumerate(steps) if step.block == EXTRACTION), 0)
    return [
        dataclasses.replace(step, has_text=number >= first_of_text, characters_in=step.characters_in if number > first_of_text else None)
        for number, step in enumerate(steps)
    ]


def dropped_files(directory: Path) -> list[Path]:
    """Returns `dropped/PHASE/TASK.jsonl` of completed tasks, in the order of the phases."""
    return [file for phase in JUDGING for file in sorted((directory / "dropped" / phase).glob("*.jsonl"))]


def document_at(directory: Path, place: str, columns: list[str]) -> dict[str, str] | None:
    """Returns the columns of the document at TASK:PLACE after the first phase; None where its file is gone. Holds one row group."""
    import pyarrow.parquet as pq

    task, row = map(int, place.split(":"))
    path = directory / "documents" / "read" / f"{task:05d}.parquet"
    if not path.is_file():
        return None
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row < num_rows:
                return file.read_row_group(group, columns=columns).slice(row, 1).to_pylist()[0]
            row -= num_rows
    return None


def _samples(directory: Path, steps: list[Step]) -> list[Sample]:
    """Returns, for each reason, the documents whose ids have the smallest hashes: any order of tasks gives the same. Holds `SAMPLES` lines a
    reason."""
    heaps: dict[tuple[str, str, str], list[tuple[int, bytes]]] = defaultdict(list)
    for file in dropped_files(directory):
        with file.open("rb") as lines:
            for line in lines:
                if _HAS_TEXT in line:
                    entry = json.loads(line)
                    heap = heaps[file.parent.name, entry["block"], entry["reason"]]
                    heapq.heappush(heap, (-xxhash.xxh3_64_intdigest(entry["id"].encode(errors="replace")), line))
                    if len(heap) > SAMPLES:
                        heapq.heappop(heap)
    samples = []
    for step in steps:
        for reason in step.reasons:
            for _, line in sorted(heaps[step.phase, step.block, reason], reverse=True):
                entry = json.loads(line)
                duplicate = _kept_instead(directory, entry["duplicate_of"]) if "duplicate_of" in entry else None
                samples.append(Sample(step.phase, step.block, reason, entry["id"], entry["url"], entry["text"], duplicate))
    return samples


def _kept_instead(directory: Path, place: str) -> dict[str, str]:
    kept = document_at(directory, place, ["id", "url", "text"]) or {"id": place, "url": "", "text": ""}
    return kept | {"text": kept["text"][:DUPLICATE_CHARACTERS]}


def _tokens(streams: Path) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Returns the tokens by stream and part, and what is wrong with the streams that cannot be read."""
    tokens: dict[str, dict[str, int]] = {}
    remarks = []
    for file in sorted(streams.glob(f"*/*/{HEADER}")):
        is_empty = list(file.parent.iterdir()) == [file]  # too few documents for a validation split, say
        try:
            num_tokens = 0 if is_empty else TokenStream(file.parent).num_tokens
        except UserError as error:
            remarks.append(str(error))
            continue
        tokens.setdefault(file.parent.parent.name, {})[file.parent.name] = num_tokens
    return tokens, remarks


def _total(metric: dict | float) -> float:
    """Returns the total of a metric, which datatrove saves as an object or, where it says it all, as its total."""
    return metric["total"] if isinstance(metric, dict) else metric


def _json(path: Path) -> Any:
    """Returns what a file says, None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: remove it, the same run command writes it again") from error
