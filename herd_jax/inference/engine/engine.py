"""The engine: takes requests, keeps the device busy, and gives answers as they come.

A step starts the next forward while the tokens of the one before are still on the device; then it looks at those, ends samples, and starts the
choice of the next tokens. So the device never waits for the host, and a sample that ends costs one row of one step.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from herd_jax.errors import UserError
from herd_jax.inference.engine.grammar import GrammarCompiler
from herd_jax.inference.engine.pages import PagePool
from herd_jax.inference.engine.programs import Drawn, Job, Programs
from herd_jax.inference.engine.progress import Progress
from herd_jax.inference.engine.requests import Answer, Piece, Request
from herd_jax.inference.engine.scheduler import Sample, Scheduler
from herd_jax.inference.engine.slots import row
from herd_jax.inference.engine.speculative import Draft
from herd_jax.inference.engine.worker import Shape, Worker, power_of_two
from herd_jax.inference.stopping import StopCondition
from herd_jax.text.tokenizer import Tokenizer

CHUNK_TOKENS = (16, 32, 64, 128, 256, 1024, 4096)  # of a row of a chunk; shorter ones go together, LEAST_TOKENS of them
LEAST_TOKENS = 256


class Row(NamedTuple):
    """A sample in a forward. `start`: the position of its first token; `last`: a draw follows."""

    sample: Sample
    turn: int
    slot: int
    start: int = -1
    last: bool = True

    @classmethod
    def of(cls, sample: Sample, *rest) -> "Row":
        return cls(sample, sample.turn, sample.slot, *rest)

    @property
    def lives(self) -> bool:
        """Returns whether the sample is still where it was when the forward began."""
        return self.sample.turn == self.turn and not self.sample.done


class Lane:
    """The forwards of one kind, as they go through the ranks of the pipeline; all that are under way have the same shape."""

    def __init__(self, num_ranks: int, is_chunk: bool) -> None:
        self.is_chunk = is_chunk
        self.shape: Shape | None = None
        self.under_way: deque[list[Row]] = deque([[] for _ in range(num_ranks - 1)])

    @property
    def is_empty(self) -> bool:
        return not any(self.under_way)


class Engine:
    """An engine for a model on a mesh. One thread calls `step`; others may call `submit` and `abort`.

    `max_length`: tokens of prompt and answer together; `num_slots`: samples at once; `chunk_tokens`: tokens of prompts that are computed between
    two decode steps; `reserve`: see `Scheduler`; `num_micro_batches`: those that go through the pipeline at a time, one for each rank by default;
    `strict`: each kind of step has one shape, so that the bits of an answer do not depend on what else is computed, nor on where its prompt's
    beginning came from; `draft`: a model that guesses.
    """

    def __init__(
        self, programs: Programs, tokenizer: Tokenizer | None, max_length: int, num_slots: int, chunk_tokens: int = 256,
        reserve: bool = True, num_micro_batches: int | None = None, strict: bool = False, draft: Draft | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.max_length, num_ranks = tokenizer, max_length, programs.num_ranks
        self.vocab_size = programs.model.config.vocab_size
        num_micro_batches = min(num_micro_batches or num_ranks, num_slots)
        self._worker = Worker(programs, num_slots, max_length, draft)
        pool = PagePool(programs.pages.num_pages, programs.pages.page_size)
        self.scheduler = Scheduler(pool, num_slots, 1 + self._worker.num_guesses, reserve, num_micro_batches)
        self._most_rows = power_of_two(-(-num_slots // num_micro_batches))
        self._least_rows = self._most_rows if strict else 1
        sizes = [tokens for tokens in CHUNK_TOKENS if tokens < chunk_tokens] + [chunk_tokens]
        several = {tokens: min(max(1, LEAST_TOKENS // tokens), power_of_two(num_slots)) for tokens in sizes}
        self._chunks = [(1, chunk_tokens)] if strict else sorted({(rows, tokens) for tokens in sizes for rows in (1, several[tokens])})
        self._always_verifies = bool(draft) or num_ranks > 1 or strict
        self._guesses_found = False
        self._decoding, self._prefilling = Lane(num_ranks, is_chunk=False), Lane(num_ranks, is_chunk=True)
        self._turns = itertools.cycle(range(max(num_micro_batches, num_ranks)))  # a micro-batch comes again when it has left the pipeline
        self._drawn: deque[tuple[Drawn, list[tuple[int, Row]]]] = deque()  # what the host has not seen, and whose it is
        self._scored: deque[tuple[Drawn, list[Row]]] = deque()
        self._inbox: deque[tuple[int, Request | None]] = deque()  # requests, and tickets to abort, from other threads
        self._tickets = itertools.count()
        self._progress: dict[Sample, Progress] = {}
        self._samples: dict[int, list[Sample]] = {}

    def hold(self, weights, of_draft=None) -> None:
        """Takes the weights to compute with, and those of the draft, or lets go of them."""
        self._worker.hold(weights, of_draft)

    def warm_up(self) -> None:
        """Compiles what plain requests need, so that the first of them do not wait for it."""
        rows = itertools.takewhile(lambda number: number <= self._most_rows, (self._least_rows << i for i in itertools.count()))
        kinds = [self._decode_kind(verifies) for verifies in ({True} if self._always_verifies else {False, bool(self._worker.num_guesses)})]
        self._worker.warm_up([(number, *kind) for number in rows for kind in kinds], [(*chunk, "last") for chunk in self._chunks])

    # --- requests

    def submit(self, request: Request) -> int:
        """Takes a request; returns its ticket. Raises UserError for one that can never be answered."""
        self.check(request)
        ticket = next(self._tickets)
        self._inbox.append((ticket, request))
        return ticket

    def check(self, request: Request) -> None:
        """Raises UserError for a request that can never be answered."""
        length = len(request.prompt)
        if not length or not all(0 <= i < self.vocab_size for i in request.prompt):
            raise UserError(f"a prompt has token ids for which the model has no embedding, or none at all: give ids from 0 to {self.vocab_size - 1}")
        if length > self.max_length:
            raise UserError(f"the prompt is {length} tokens long: the model's context holds {self.max_length}; shorten it")
        if outside := [i for i in (*request.sampling.logit_bias, *request.sampling.stop_ids) if i >= self.vocab_size]:
            raise UserError(f"logit_bias or stop_ids name token {outside[0]}: the model's ids go up to {self.vocab_size - 1}")
        if request.grammar:
            self._grammars.compile(request.grammar)
        room = (self.scheduler.pool.num_pages - 1) * self.scheduler.pool.page_size
        if self._limit(request) > room:
            raise UserError(
                f"prompt and answer may take {self._limit(request)} tokens, and the cache holds {room}: ask for fewer new tokens, or give the engine a "
                "larger max_tokens_in_cache"
            )

    @functools.cached_property
    def _grammars(self) -> GrammarCompiler:
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer beside it, so no answer can follow a grammar: put the tokenizer's files into its directory")
        return GrammarCompiler(self.tokenizer, self.vocab_size)

    def _limit(self, request: Request) -> int:
        return min(self.max_length, len(request.prompt) + request.sampling.max_new_tokens)

    def abort(self, ticket: int) -> None:
        """Ends a request's answers at the next step; their pages are free then. Does nothing where it has ended already."""
        self._inbox.append((ticket, None))

    @property
    def has_work(self) -> bool:
        return bool(self._inbox or self._samples or self._drawn or self._scored)

    @property
    def load(self) -> int:
        """Returns the number of answers that have not ended."""
        return sum(map(len, list(self._samples.values()))) + len(self._inbox)

    def knows(self, ticket: int) -> bool:
        """Returns whether a request has answers that have not ended."""
        return ticket in self._samples or any(ticket == waiting for waiting, _ in list(self._inbox))

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Yields the answers as they end; an answer's `ticket` is its request's place among `requests`."""
        return answers(self, requests)

    def _take_in(self) -> list[Piece | Answer]:
        """Queues the requests that came, and ends those that are to be aborted."""
        ended: list[Piece | Answer] = []
        while self._inbox:
            ticket, request = self._inbox.popleft()
            if request is not None:
                self._queue(ticket, request)
                continue
            for sample in reversed(self._samples.get(ticket, [])[:]):
                progress = self._progress[sample]
                progress.reason = "abort"
                ended += [Piece(ticket, progress.number, "", (), (), "abort"), self._end(sample)]
        return ended

    def _queue(self, ticket: int, request: Request) -> None:
        limit, prompt, samples = self._limit(request), object(), self._samples.setdefault(ticket, [])
        for number in range(request.first_sample, request.first_sample + request.num_samples):
            scores = request.scores_prompt and number == request.first_sample
            sample = Sample(list(request.prompt), limit, request.salt, not request.scores_prompt, scores, prompt)
            guide = self._grammars.compile(request.grammar) if request.grammar else None
            stop = StopCondition(self.tokenizer, request.sampling, limit - len(request.prompt))
            self._progress[sample] = Progress(ticket, number, request, stop, guide)
            samples.append(sample)
            self.scheduler.add([sample])

    # --- a step

    def step(self) -> list[Piece | Answer]:
        """Goes on by one step, and returns what is new."""
        events = self._take_in()
        if admitted := self.scheduler.admit():
            self._worker.prepare([sample.slot for sample in admitted], [self._row(sample) for sample in admitted])
        decoded, computed = self._decode(), self._prefill()
        events += self._look_at_drawn()
        if decoded:
            self._choose_next(*decoded)
        if computed:
            self._choose_first(*computed)
        return events

    def _row(self, sample: Sample):
        progress, worker = self._progress[sample], self._worker
        request = progress.request
        return row(
            request.sampling, sample.ids, sample.num_prompt, sample.limit, sample.pages, worker.max_length, worker.max_pages, sample.computed,
            progress.number, request.speculates and request.grammar is None,
        )  # fmt: skip

    def _decode_kind(self, verifies: bool) -> tuple[int, str]:
        guesses = self._worker.num_guesses
        return (1 + guesses, "all") if verifies and guesses else (1, "last")

    def _decode(self):
        """Starts a decode step of the samples whose turn it is; returns what left the pipeline."""
        lane, turn = self._decoding, next(self._turns)
        samples = self.scheduler.ready(turn) if turn < self.scheduler.num_micro_batches else []
        tokens, what = self._decode_kind(self._always_verifies or self._guesses_found)
        if not lane.is_empty and (lane.shape[1] != tokens or len(samples) > lane.shape[0]):
            return self._tick(lane, lane.shape, [])  # what is under way leaves first
        if not self.scheduler.reserve:
            grown = self.scheduler.grow(samples)
            if grown:
                self._worker.set_tables([sample.slot for sample in grown], [sample.pages for sample in grown])
            samples = [sample for sample in samples if sample.slot is not None]
        number = max(self._least_rows, power_of_two(len(samples))) if lane.is_empty else lane.shape[0]
        return self._tick(lane, (number, tokens, what), [Row.of(sample) for sample in samples])

    def _prefill(self):
        """Starts the next chunk of prompts; returns what left the pipeline."""
        lane, chunk = self._prefilling, self.scheduler.next_chunk(self._chunks)
        if chunk is None:
            return self._tick(lane, lane.shape, [])
        number, tokens, samples = chunk
        shape = number, tokens, "prompt" if samples[0].scores else "last"
        if not lane.is_empty and lane.shape != shape:
            return self._tick(lane, lane.shape, [])
        starts = [sample.computed for sample in samples]
        return self._tick(lane, shape, [Row.of(s, start, self.scheduler.compute(s, tokens)) for s, start in zip(samples, starts)])

    def _tick(self, lane: Lane, shape: Shape, rows: list[Row]) -> tuple[list[Row], Job, Any] | None:
        """Starts a forward, in which `rows` enter the pipeline; returns those that left it, with their job and what was found."""
        if not rows and lane.is_empty:
            return None
        lane.shape = shape
        job, found = self._worker.forward(shape, [row.slot for row in rows], lane.is_chunk)
        lane.under_way.append(rows)
        left = lane.under_way.popleft()
        for row in rows:
            self.scheduler.in_flight[row.slot] += 1
        for row in left:
            self.scheduler.in_flight[row.slot] -= 1
        return (left, job, found) if left else None

    def _choose_next(self, rows: list[Row], job: Job, logits) -> None:
        """Draws the next tokens of samples that took a decode step."""
        if any(row.lives for row in rows):
            self._sample(job, logits, list(range(len(rows))), rows)

    def _choose_first(self, rows: list[Row], job: Job, found) -> None:
        """Draws the first tokens of samples whose prompts are computed, and of those that follow them."""
        if rows[0].sample.scores:
            found, scores = found
            self._scored.append((scores, rows))
        first, places, copies = [], [], []
        for i, leading in enumerate(rows):
            if not leading.last or not leading.lives:
                continue
            followers = self.scheduler.lead(leading.sample)
            whole, rest = divmod(len(leading.sample.ids), self.scheduler.pool.page_size)
            copies += [(leading.sample.pages[whole], follower.pages[whole]) for follower in followers if rest]
            first += [Row.of(sample) for sample in (leading.sample, *followers)]
            places += [i] * (1 + len(followers))
        if copies:
            self._worker.copy_pages(copies)
        if first:
            self._sample(job, found, places, first)

    def _sample(self, job: Job, logits, places: list[int], rows: list[Row]) -> None:
        living = [(i, row) for i, row in enumerate(rows) if row.lives]
        numbers = [row.slot if row.lives else self._worker.num_slots for row in rows]
        guides = {i: self._progress[row.sample].guide for i, row in living if self._progress[row.sample].guide}
        mask = None
        if guides:
            mask = np.full((len(rows), self._grammars.num_words), 2**32 - 1, np.uint32)
            for i, guide in guides.items():
                mask[i] = guide.mask()
        self._drawn.append((self._worker.sample(job, logits, places, numbers, mask), living))
        for _, row in living:
            row.sample.unseen += 1

    # --- what the host sees

    def _look_at_drawn(self) -> list[Piece | Answer]:
        """Takes the tokens that were drawn in the step before; returns what they add to the answers, and the answers that they end."""
        while self._scored:
            scores, rows = self._scored.popleft()
            for i, row in enumerate(rows):
                if row.lives:
                    self._progress[row.sample].push_scores(scores, i, min(row.sample.target - row.start, scores.ids.shape[1]))
        events: list[Piece | Answer] = []
        self._guesses_found &= not self._drawn
        while self._drawn:
            drawn, rows = self._drawn.popleft()
            ids = np.asarray(drawn.ids)
            for i, row in rows:
                if row.lives:
                    row.sample.unseen -= 1
                    self._guesses_found |= bool(ids[i, -1])
                    piece = self._progress[row.sample].push(drawn, i, ids[i, : ids[i, -2]].tolist())
                    row.sample.ids += piece.ids
                    events += [piece, self._end(row.sample)] if piece.finish_reason else [piece]
        return events

    def _end(self, sample: Sample) -> Answer:
        progress = self._progress.pop(sample)
        self.scheduler.finish(sample)
        others = self._samples[progress.ticket]
        others.remove(sample)
        if not others:
            del self._samples[progress.ticket]
        return progress.answer(sample)


def answers(engine, requests: Iterable[Request]) -> Iterator[Answer]:
    """Yields the answers of an engine as they end; an answer's `ticket` is its request's place among `requests`."""
    place: dict[int, int] = {}
    missing = 0
    try:
        for i, request in enumerate(requests):
            place[engine.submit(request)] = i
            missing += request.num_samples
        while missing:
            for event in engine.step():
                if isinstance(event, Answer) and event.ticket in place:
                    missing -= 1
                    yield event.of(place[event.ticket])
    finally:
        for ticket in place if missing else ():
            engine.abort(ticket)
