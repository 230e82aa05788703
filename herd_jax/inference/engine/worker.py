"""The device's side of an engine: its state, and the programs that change it, called with plain numbers."""

from collections.abc import Sequence

import jax
import numpy as np

from herd_jax.inference.engine.layout import BIN
from herd_jax.inference.engine.programs import Carry, Drawn, Job, Programs
from herd_jax.inference.engine.slots import Slots, empty
from herd_jax.inference.engine.speculative import Draft

Shape = tuple[int, int, str]  # rows, tokens, what: a forward of `Programs`
SEVERAL = 16  # samples that are put into their slots at once, at most


class Worker:
    """Holds weights, pages and slots. Slot number `num_slots` is nobody's, and `num_slots` + 1 is none at all."""

    def __init__(self, programs: Programs, num_slots: int, max_length: int, draft: Draft | None) -> None:
        self.programs, self.num_slots, self.draft = programs, num_slots, draft
        self.max_pages = -(-max_length // programs.pages.page_size)
        self.max_length = self.max_pages * programs.pages.page_size
        self.num_guesses = draft.num_guesses if draft else programs.num_guesses
        self._weights, self._pools = None, programs.new_pools()
        self._slots, self._carries = programs.put(empty(num_slots, self.max_length, self.max_pages)), {}

    def hold(self, weights, of_draft=None) -> None:
        """Takes the weights to compute with, and those of the draft, or lets go of them."""
        self._weights = weights
        if self.draft:
            self.draft.weights = of_draft

    def prepare(self, numbers: Sequence[int], rows: Sequence[Slots]) -> None:
        """Puts rows into slots."""
        for first in range(0, len(rows), SEVERAL):
            some, slots = list(rows[first : first + SEVERAL]), list(numbers[first : first + SEVERAL])
            some += some[-1:] * (power_of_two(len(some)) - len(some))
            put, joined = self.programs.put, jax.tree.map(lambda *parts: np.concatenate(parts), *some)
            self._slots = self.programs.prepare(self._slots, put(self._filled(slots, len(some), self.num_slots + 1)), put(joined))

    def set_tables(self, numbers: Sequence[int], pages: Sequence[Sequence[int]]) -> None:
        """Gives slots their pages."""
        tables = np.zeros((power_of_two(len(numbers)), self.max_pages), np.int32)
        for row, of_slot in zip(tables, pages):
            row[: len(of_slot)] = of_slot
        slots = self._filled(numbers, len(tables), self.num_slots + 1)
        self._slots = self.programs.set_tables(self._slots, self.programs.put(slots), self.programs.put(tables))

    def forward(self, shape: Shape, numbers: Sequence[int], is_chunk: bool):
        """Starts a forward, which `numbers` enter; returns the job that leaves it, and what was found of it."""
        carry: Carry | None = self._carries.pop(shape, None) or self.programs.new_carry(*shape[:2])
        slots = self.programs.put(self._filled(numbers, shape[0], self.num_slots))
        run = self.programs.forward(*shape)
        self._pools, self._slots, self._carries[shape], job, found = run(self._weights, self._pools, self._slots, carry, slots)
        if self.draft and is_chunk:
            self.draft.follow(self._slots, job, shape[1])
        return job, found

    def sample(self, job: Job, logits, places: Sequence[int], numbers: Sequence[int], mask: np.ndarray | None) -> Drawn:
        """Starts the choice of what follows in slots, of which `places` are the rows of job and logits."""
        number, put = max(len(job.slot_B), power_of_two(len(numbers))), self.programs.put
        if mask is not None:
            mask = put(np.pad(mask, ((0, number - len(mask)), (0, 0)), constant_values=2**32 - 1))
        slots = put(self._filled(numbers, number, self.num_slots))
        self._slots, drawn = self.programs.sample(self._slots, job, logits, put(self._filled(places, number, 0)), slots, mask)
        if self.draft:
            self._slots = self.draft.guess(self._slots, slots)
        drawn.ids.copy_to_host_async()
        return drawn

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies pages, from the first of each pair to the second."""
        columns = [self.programs.put(self._filled(column, power_of_two(len(pairs)), BIN)) for column in zip(*pairs)]
        self._pools = self.programs.copy_pages(self._pools, *columns)
        if self.draft:
            self.draft.copy_pages(*columns)

    def warm_up(self, decoding: Sequence[Shape], chunks: Sequence[Shape]) -> None:
        """Compiles what plain requests need, by steps in which nobody takes part."""
        for shape in (*decoding, *chunks):
            job, found = self.forward(shape, [], shape in chunks)
            jax.block_until_ready(self.sample(job, found, [], [], None))

    @staticmethod
    def _filled(values: Sequence[int], number: int, rest: int) -> np.ndarray:
        return np.array([*values, *[rest] * (number - len(values))], np.int32)


def power_of_two(size: int) -> int:
    """Returns the smallest power of 2 that holds `size`, and at least 1."""
    return 1 << max(0, size - 1).bit_length()
