"""Whole examples packed into rows: a dialog, or a prompt with its responses, is never cut. Which examples a row has is a function of (seed, epoch, row).

Rows of pre-training cut documents (`rows.py`); rows here have room left at their end instead, which nothing reads.
"""

import functools
import threading
from collections.abc import Mapping, Sequence

import numpy as np

Example = Mapping[str, np.ndarray]  # fields by name, of one value for each of the example's tokens
NUMBERED = ("segment_ids", "prompt_ids", "response_ids")  # fields that count from 1 in each example, and go on from one to the next in a row
OPEN_ROWS = 64  # that an example may go into; more fill better and take longer


class PackedRows:
    """Rows without end of `seq_len` tokens, made of examples of several sources; row i, for any i >= 0, depends on the examples, `epochs`, `seed` and
    i alone. In each epoch an example of a source comes as often as `epochs` says, a part of once at random: 2.5 is twice, and a third time for half
    of them.

    `most`: how many values of a numbered field a row may have, by its name. An example must fit into a row by itself.
    """

    def __init__(self, sources: Sequence[Sequence[Example]], epochs: Sequence[float], seq_len: int, seed: int, most: Mapping[str, int] = {}):
        self._examples = [example for source in sources for example in source]
        self._first = np.cumsum([0, *map(len, sources)])
        self._epochs, self._seq_len, self._seed, self._most = epochs, seq_len, seed, most
        self._sizes = np.array([[len(example["tokens"]), *(example[name].max(initial=0) for name in most)] for example in self._examples])
        self._room = np.array([seq_len, *most.values()])
        self.plan = functools.lru_cache(maxsize=2)(self._plan)  # the rows of a batch are of one epoch or two
        self._starts, self._lock = [0], threading.Lock()  # the first row of each epoch that is known; several threads read rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, first = self.locate(index)
        return join([self._examples[i] for i in self.plan(epoch)[index - first]], self._seq_len)

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the epoch of a row, and the first row of that epoch."""
        with self._lock:
            while self._starts[-1] <= index:
                self._starts.append(self._starts[-1] + len(self.plan(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return epoch, self._starts[epoch]

    def _plan(self, epoch: int) -> list[list[int]]:
        """Returns the examples of each row of an epoch."""
        random = np.random.default_rng([self._seed, epoch])
        chosen = []
        for times, first, stop in zip(self._epochs, self._first, self._first[1:]):
            whole, part = divmod(times, 1)
            again = random.permutation(np.arange(first, stop))[: round(part * (stop - first))]
            chosen += [np.tile(np.arange(first, stop), int(whole)), again]
        order = random.permutation(np.concatenate(chosen))
        rows = pack(self._sizes[order], self._room)
        return [[int(order[i]) for i in rows[row]] for row in random.permutation(len(rows))]


def pack(sizes_ND: np.ndarray, room_D: np.ndarray) -> list[list[int]]:
    """Returns which of N examples go into each row, in their order: each goes into the fullest open row that has room for it in all D sizes.

    Each must fit into an empty row.
    """
    assert (sizes_ND <= room_D).all()
    rows: list[list[int]] = []
    left_OD, open_rows = np.tile(room_D, (OPEN_ROWS, 1)), [-1] * OPEN_ROWS
    for i, size_D in enumerate(sizes_ND):
        fits_O = (left_OD >= size_D).all(1)
        if fits_O.any():
            at = int(np.where(fits_O, left_OD[:, 0], np.iinfo(np.int64).max).argmin())
        else:  # the fullest is closed
            at = int(left_OD[:, 0].argmin())
            left_OD[at], open_rows[at] = room_D, -1
        if open_rows[at] < 0:
            open_rows[at] = len(rows)
            rows.append([])
        rows[open_rows[at]].append(i)
        left_OD[at] -= size_D
    return rows


def join(examples: Sequence[Example], seq_len: int) -> dict[str, np.ndarray]:
    """Returns the row of `seq_len` tokens that has these examples one after the other, and zeros behind them."""
    row, numbered = {}, {name: 0 for name in NUMBERED}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in examples[0]}
    for example in examples:
        for name, values in example.items():
            parts[name].append(np.where(values > 0, values + numbered[name], 0) if name in numbered else values)
        for name in numbered.keys() & example.keys():
            numbered[name] += int(example[name].max(initial=0))
    for name, of_name in parts.items():
        row[name] = np.zeros(seq_len, of_name[0].dtype)
        joined = np.concatenate(of_name)
        row[name][: len(joined)] = joined
    return row
