"""Documents between phases: one Parquet file a task, written whole or not at all, read in pieces."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.block import task_file, unfinished

BATCH_CHARACTERS = 2**24  # of a row group: what a task holds while it reads or writes
COMPRESSION = "zstd"


class Store(PipelineStep):
    """Writes the documents that pass into `DIRECTORY/TASK.parquet`: columns id, text, and one a key of the metadata.

    `columns` names the metadata with their types: "string", "float64" or "int64".
    """

    type = "writer"
    name = "store"

    def __init__(self, directory: Path, columns: dict[str, str]):
        super().__init__()
        self._directory, self._columns = directory, columns

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([("id", pa.string()), ("text", pa.large_string()), *((name, pa.type_for_alias(t)) for name, t in self._columns.items())])
        path = task_file(self._directory, rank, "parquet")
        with pq.ParquetWriter(unfinished(path), schema, compression=COMPRESSION) as writer:
            rows, characters = [], 0
            for doc in data:
                rows.append({"id": doc.id, "text": writable(doc.text), **{name: doc.metadata.get(name) for name in self._columns}})
                characters += len(doc.text) + 1
                if characters >= BATCH_CHARACTERS:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows, characters = [], 0
                yield doc
            writer.write_table(pa.Table.from_pylist(rows, schema))
        unfinished(path).rename(path)


class Load(PipelineStep):
    """Yields the documents of `DIRECTORY/TASK.parquet`, each with its "number": TASK x 2^32 + its place in the file."""

    type = "reader"
    name = "load"

    def __init__(self, directory: Path):
        super().__init__()
        self._directory = directory

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for place, row in enumerate(rows(task_file(self._directory, rank, "parquet"))):
            doc_id, text = row.pop("id"), row.pop("text")
            yield Document(text=text, id=doc_id, metadata={**row, "number": document_number(rank, place)})


def rows(path: Path, columns: list[str] | None = None) -> Iterator[dict]:
    """The rows of a file that `Store` wrote, one row group in memory at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=columns).to_pylist()


def num_documents(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def document_number(task: int, place: int) -> int:
    return task << 32 | place


def writable(text: str) -> str:
    """The text without the lone surrogates that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text
