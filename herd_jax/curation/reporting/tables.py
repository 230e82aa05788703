"""Counts over the Parquet files of a curation run, by column: a batch of rows in memory at a time, texts measured and not looked at."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BATCH_ROWS = 4096
QUALITY_BINS = 20
_KEYS = ("category", "language", "source_type", "topic")
# '.warc.gz' of 'a.b.warc.gz', '.html' of 'index.de.html'
_SOURCE_TYPE = r"(?P<type>\.(?:[0-9A-Za-z_]+\.(?:gz|bz2|xz|zst)|[0-9A-Za-z_]+))$"


@dataclasses.dataclass(frozen=True)
class Group:
    """Clean documents of a stream that agree in these columns; "" where unknown."""

    stream: str
    category: str
    language: str
    source_type: str
    topic: str
    documents: int
    characters: int


@dataclasses.dataclass(frozen=True)
class Histogram:
    """`counts[i]` documents of a stream lie in [edges[i], edges[i + 1])."""

    stream: str
    edges: list[float]
    counts: list[int]


@dataclasses.dataclass(frozen=True)
class Clean:
    """What the clean documents are like: lengths in characters, in octaves; quality where a block gave one."""

    groups: list[Group]
    lengths: list[Histogram]
    qualities: list[Histogram]


def count_read(directory: Path) -> dict[str, dict[str, int]]:
    """Counts the documents by "language" and by "source_type"."""
    counts = {"language": Counter(), "source_type": Counter()}
    for batch in _batches(directory, ["language", "source"]):
        for (_, language, source_type, _), documents, _ in _grouped(batch, np.zeros(len(batch), np.int64)):
            counts["language"][language] += documents
            counts["source_type"][source_type] += documents
    return {name: dict(sorted(count.items())) for name, count in counts.items()}


def count_clean(directory: Path) -> Clean:
    import pyarrow.compute as pc

    clean = Clean([], [], [])
    for stream in sorted(path for path in directory.glob("*/") if any(path.glob("*.parquet"))):
        documents: Counter[tuple[str, ...]] = Counter()
        characters: Counter[tuple[str, ...]] = Counter()
        octaves = np.zeros(64, np.int64)
        edges = _quality_edges(stream)
        qualities = np.zeros(QUALITY_BINS, np.int64)
        for batch in _batches(stream, ["text", "category", "language", "source", "topic", "quality"]):
            lengths = pc.utf8_length(batch["text"]).to_numpy()
            for key, num_documents, num_characters in _grouped(batch, lengths):
                documents[key] += num_documents
                characters[key] += num_characters
            octaves += np.bincount(np.frexp(np.maximum(lengths, 1))[1] - 1, minlength=64)
            if edges is not None and "quality" in batch.column_names:
                quality = batch["quality"].drop_null().to_numpy()
                qualities += np.histogram(quality[np.isfinite(quality)], edges)[0]
        clean.groups.extend(Group(stream.name, *key, documents[key], characters[key]) for key in sorted(documents))
        if octaves.any():
            used = np.flatnonzero(octaves)
            first, last = int(used[0]), int(used[-1])
            clean.lengths.append(Histogram(stream.name, [2.0**i for i in range(first, last + 2)], octaves[first : last + 1].tolist()))
        if edges is not None:
            clean.qualities.append(Histogram(stream.name, edges.tolist(), qualities.tolist()))
    return clean


def _batches(directory: Path, columns: list[str]) -> Iterator:
    """Yields tables of those columns that the files have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in sorted(directory.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(BATCH_ROWS, columns=present):
                yield pa.table(batch)


def _grouped(batch, lengths: np.ndarray) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Yields ((category, language, source type, topic), documents, characters) of each combination in a batch."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def column(name: str):
        return pc.fill_null(batch[name], "") if name in batch.column_names else pa.array([""] * len(batch))

    types = pc.fill_null(pc.struct_field(pc.extract_regex(column("source"), _SOURCE_TYPE), "type"), "")
    keys = {"category": column("category"), "language": column("language"), "source_type": types, "topic": column("topic")}
    table = pa.table(keys | {"characters": lengths})
    for row in table.group_by(list(_KEYS)).aggregate([("characters", "sum"), ("characters", "count")]).to_pylist():
        yield tuple(row[key] for key in _KEYS), row["characters_count"], row["characters_sum"]


def _quality_edges(stream: Path) -> np.ndarray | None:
    """Returns whole numbers around what the files' own statistics say; None where no document has a quality."""
    import pyarrow.parquet as pq

    bounds = []
    for path in sorted(stream.glob("*.parquet")):
        metadata = pq.read_metadata(path)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema == "quality" and column.statistics and column.statistics.has_min_max:
                    bounds += [column.statistics.min, column.statistics.max]
    if not (bounds := [bound for bound in bounds if np.isfinite(bound)]):
        return None
    low = np.floor(min(bounds))
    return np.linspace(low, max(np.ceil(max(bounds)), low + 1), QUALITY_BINS + 1)
