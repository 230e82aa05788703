"""Records that change hands between the tasks of two phases, by key: the shuffle of MapReduce, on files.

A directory holds one `.npy` a task, its records sorted by key. A task of the next phase takes a range of keys out of every file, through a
memory map, so it holds its share of the records and no more.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from herd_jax.curation.block import task_file
from herd_jax.files import whole_file

KEY = ("key", "<u8")


def write(directory: Path, task: int, records: np.ndarray) -> None:
    """Writes the records of a task, a structured array with a field "key"; of equal keys the order stays."""
    with whole_file(task_file(directory, task, "npy")) as file:
        np.save(file, records[np.argsort(records["key"], kind="stable")])


def read(directory: Path, low: int, high: int) -> np.ndarray:
    """Returns the records with keys in [low, high) of all tasks, sorted by key, equal keys in the order of their tasks."""
    parts = [part[:] for part in parts_between(directory, low, high)]
    records = np.concatenate(parts)
    return records[np.argsort(records["key"], kind="stable")]


def parts_between(directory: Path, low: int, high: int) -> Iterator[np.ndarray]:
    """Yields, for each task, the records with keys in [low, high), sorted, mapped and not yet read."""
    for file in sorted(directory.glob("*.npy")):
        records = np.load(file, mmap_mode="r")
        first = np.searchsorted(records["key"], np.uint64(low))
        last = np.searchsorted(records["key"], np.uint64(high)) if high < 2**64 else len(records)
        yield records[first:last]


def key_range(task: int, num_tasks: int) -> tuple[int, int]:
    """Returns a task's share of the keys, where they are spread evenly over 64 bits."""
    return task * 2**64 // num_tasks, (task + 1) * 2**64 // num_tasks
