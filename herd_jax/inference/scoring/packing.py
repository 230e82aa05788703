"""Contexts with their continuations, packed into rows of tokens."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

Continuations = list[tuple[int, Sequence[int]]]  # (index of the request, ids)


@dataclasses.dataclass(frozen=True)
class Unit:
    """A context and continuations of it. The last token of a continuation is predicted, and needs no place in the row."""

    context: tuple[int, ...]
    continuations: Continuations

    @property
    def size(self) -> int:
        """Returns how many places the unit needs, for its tokens and for its targets."""
        num_targets = sum(len(ids) for _, ids in self.continuations)
        return max(len(self.context) + num_targets - len(self.continuations), num_targets)


class Pack:
    """Units that share a row."""

    def __init__(self, units: list[Unit]):
        self.units = units

    @property
    def size(self) -> int:
        return sum(unit.size for unit in self.units)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Yields, for each request, its index and the places of its targets."""
        first = 0
        for unit in self.units:
            for i, ids in unit.continuations:
                yield i, slice(first, first + len(ids))
                first += len(ids)

    def arrays(self, size: int, num_targets: int, first_position: int) -> dict[str, np.ndarray]:
        """Returns the row's fields by name: tokens and what they see [size], targets [num_targets]."""
        of_tokens = ("tokens", "positions", "context_start", "context_end", "own_start", "own_end")
        row = {name: np.zeros(size, np.int32) for name in of_tokens}
        row |= {name: np.zeros(num_targets, np.int32) for name in ("target_index", "targets")}
        at, target = 0, 0
        for unit in self.units:
            start, length = at, len(unit.context)
            here, index = slice(start, start + length), np.arange(length)
            row["tokens"][here], row["positions"][here] = unit.context, first_position + index
            row["context_start"][here], row["context_end"][here] = start, start + index + 1
            at += length
            for _, ids in unit.continuations:
                here, index = slice(at, at + len(ids) - 1), np.arange(len(ids) - 1)
                row["tokens"][here], row["positions"][here] = ids[:-1], first_position + length + index
                row["context_start"][here], row["context_end"][here] = start, start + length
                row["own_start"][here], row["own_end"][here] = at, at + index + 1
                predicting = slice(target, target + len(ids))
                row["target_index"][predicting] = [start + length - 1, *range(at, at + len(ids) - 1)]
                row["targets"][predicting] = ids
                at, target = at + len(ids) - 1, target + len(ids)
        return row | {"num_targets": np.int32(target)}


def make_units(context: tuple[int, ...], continuations: Continuations, capacity: int) -> Iterator[Unit]:
    """Yields the context with as many of its continuations at a time as `capacity` places hold."""
    some: Continuations = []
    for continuation in continuations:
        if some and Unit(context, [*some, continuation]).size > capacity:
            yield Unit(context, some)
            some = []
        some.append(continuation)
    yield Unit(context, some)


def pack_units(units: list[Unit], capacity: int) -> list[Pack]:
    """Packs units into rows of at most `capacity` places, except for single units that need more; first-fit, longest first."""
    packs: list[Pack] = []
    rooms: list[int] = []
    for unit in sorted(units, key=lambda unit: unit.size, reverse=True):
        at = next((i for i, room in enumerate(rooms) if unit.size <= room), None)
        if at is None:
            packs.append(Pack([]))
            rooms.append(capacity)
            at = len(packs) - 1
        packs[at].units.append(unit)
        rooms[at] -= unit.size
    return packs
