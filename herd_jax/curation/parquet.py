"""Documents between phases: one Parquet file a task, written whole or not at all, read in pieces."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from herd_jax.curation.block import task_file
from herd_jax.files import whole_file

BATCH_CHARACTERS = 2**24  # of a row group: what a task holds while it reads or writes
COMPRESSION = "zstd"


class Store(PipelineStep):
    """Writes the documents that pass into `DIRECTORY/TASK.parquet`, or with `by`, a key of the metadata, into `DIRECTORY/VALUE/TASK.parquet`.

    Columns are id, text, and the metadata that `columns` names with their types: "string", "float64" or "int64".
    """

    type = "writer"
    name = "store"

    def __init__(self, directory: Path, columns: dict[str, str], by: str | None = None):
        super().__init__()
        self._directory, self._columns, self._by = directory, columns, by

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        files: dict[Path, _File] = {}
        with contextlib.ExitStack() as stack:
            if self._by is None:  # also of a task without documents
                path = task_file(self._directory, rank, "parquet")
                files[self._directory] = stack.enter_context(_File(path, self._columns))
            for doc in data:
                directory = self._directory / doc.metadata[self._by] if self._by else self._directory
                if directory not in files:
                    files[directory] = stack.enter_context(_File(task_file(directory, rank, "parquet"), self._columns))
                files[directory].append(doc)
                yield doc


class _File:
    """A Parquet file in the making; it gets its name when the block ends without an exception."""

    def __init__(self, path: Path, columns: dict[str, str]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = [(name, pa.type_for_alias(alias)) for name, alias in columns.items()]
        self._schema = pa.schema([("id", pa.string()), ("text", pa.large_string()), *types])
        self._columns = columns
        self._stack = contextlib.ExitStack()
        file = self._stack.enter_context(whole_file(path))
        self._writer = self._stack.enter_context(pq.ParquetWriter(file, self._schema, compression=COMPRESSION))
        self._rows: list[dict] = []
        self._characters = 0

    def __enter__(self) -> "_File":
        return self

    def append(self, doc: Document) -> None:
        values = {name: doc.metadata.get(name) for name in self._columns}
        self._rows.append({"id": writable(doc.id), "text": writable(doc.text), **{k: writable(v) if isinstance(v, str) else v for k, v in values.items()}})
        self._characters += len(doc.text) + 1
        if self._characters >= BATCH_CHARACTERS:
            self._write_rows()

    def __exit__(self, kind, error, traceback) -> None:
        with self._stack:  # which sees an exception of the rows, too
            if error is not None:
                raise error
            self._write_rows()

    def _write_rows(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._characters = [], 0


class Number(PipelineStep):
    """Gives each document its "number", TASK x 2^32 + its place in the file that `Store` writes next."""

    type = "count"
    name = "number"

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for place, doc in enumerate(data):
            doc.metadata["number"] = document_number(rank, place)
            yield doc


class Load(PipelineStep):
    """Yields the documents of `DIRECTORY/TASK.parquet`, each with its "number"."""

    type = "reader"
    name = "load"

    def __init__(self, directory: Path):
        super().__init__()
        self._directory = directory

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        path = task_file(self._directory, rank, "parquet")
        for place, row in enumerate(rows(path)):
            doc_id, text = row.pop("id"), row.pop("text")
            yield Document(text=text, id=doc_id, metadata={**row, "number": document_number(rank, place)})


def rows(path: Path, columns: list[str] | None = None) -> Iterator[dict]:
    """Yields the rows of a file that `Store` wrote, one row group in memory at a time."""
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
    """Returns the text without the lone surrogates that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text
