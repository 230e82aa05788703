"""The engine: takes requests, keeps the device busy, and gives answers as they come.

A step dispatches the next forward while the tokens of the one before are still on the device; then it looks at those, ends samples, and dispatches
the choice of the next tokens. So the device never waits for the host, and a sample that ends costs one row of one step.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from herd_jax.errors import UserError
from herd_jax.inference.draw import NOT_FINITE
from herd_jax.inference.engine.grammar import Guide, GrammarCompiler
from herd_jax.inference.engine.layout import BIN
from herd_jax.inference.engine.pages import PagePool
from herd_jax.inference.engine.programs import Drawn, Job, Programs
from herd_jax.inference.engine.requests import Answer, LogProb, Piece, Request
from herd_jax.inference.engine.scheduler import Sample, Scheduler
from herd_jax.inference.engine.slots import empty, row
from herd_jax.inference.engine.speculative import Draft
from herd_jax.inference.stopping import StopCondition
from herd_jax.text.tokenizer import Tokenizer

Shape = tuple[int, int, str]  # rows, tokens, what: a forward of `Programs`


class Row(NamedTuple):
    """A sample in a forward. `last`: a draw follows; `start`: the position of its first token."""

    sample: Sample
    turn: int
    slot: int
    last: bool
    start: int

    @property
    def lives(self) -> bool:
        """Returns whether the sample is still where it was when the forward began."""
        return self.sample.turn == self.turn and not self.sample.done


class Lane:
    """The forwards of one kind, as they go through the ranks of the pipeline; all under way have the same shape."""

    def __init__(self, num_ranks: int) -> None:
        self.shape: Shape | None = None
        self.under_way: deque[list[Row] | None] = deque([None] * (num_ranks - 1))
        self.carries: dict[Shape, Any] = {}

    @property
    def is_empty(self) -> bool:
        return not any(self.under_way)


class Progress:
    """An answer so far."""

    def __init__(self, ticket: int, number: int, request: Request, stop: StopCondition, guide: Guide | None) -> None:
        self.ticket, self.number, self.request, self.stop, self.guide = ticket, number, request, stop, guide
        self.text: list[str] = []
        self.log_probs: list[LogProb] = []
        self.prompt_log_probs: list[LogProb] = []


class Engine:
    """An engine for a model on a mesh. `max_length`: tokens of prompt and answer together; `num_slots`: samples at once; `chunk_tokens`: tokens of
    prompts that are computed between two decode steps; `reserve`: see `Scheduler`; `num_micro_batches`: those that go through the pipeline at a
    time, one per rank by default; `draft`: a model that guesses; `strict`: each kind of step has one shape only, so that the bits of an answer do not depend on how much else is
    computed beside it, nor on where its prompt's beginning came from. One thread calls `step`; others may call `submit` and `abort`."""

    def __init__(
        self, programs: Programs, tokenizer: Tokenizer | None, max_length: int, num_slots: int, chunk_tokens: int = 256,
        reserve: bool = True, num_micro_batches: int | None = None, strict: bool = False, draft: Draft | None = None,
    ) -> None:  # fmt: skip
        self.programs, self.tokenizer, self.num_slots, self.max_length, self.weights = programs, tokenizer, num_slots, max_length, None
        pages, num_ranks = programs.pages, programs.num_ranks
        self.max_pages = -(-max_length // pages.page_size)
        self.size = self.max_pages * pages.page_size
        num_micro_batches = min(num_micro_batches or num_ranks, num_slots)
        pool = PagePool(pages.num_pages, pages.page_size)
        self.draft, self.num_guesses = draft, draft.num_guesses if draft else programs.num_guesses
        self.scheduler = Scheduler(pool, num_slots, 1 + self.num_guesses, reserve, num_micro_batches)
        sizes = [tokens for tokens in (16, 64, 256, 1024, 4096) if tokens < chunk_tokens] + [chunk_tokens]
        self.least_rows = bucket(-(-num_slots // num_micro_batches)) if strict else 1
        self.chunks = [(1, chunk_tokens)] if strict else sorted({(rows, tokens) for tokens in sizes for rows in (1, min(max(1, 256 // tokens), bucket(num_slots)))})
        self.pools, self.slots = programs.new_pools(), programs.put(empty(num_slots, self.size, self.max_pages))
        self._decoding, self._prefilling = Lane(num_ranks), Lane(num_ranks)
        self._turns = itertools.cycle(range(max(num_micro_batches, num_ranks)))  # a micro-batch comes again when it has left the pipeline
        self._guesses_found = False
        self._drawn: deque[tuple[Drawn, list[tuple[int, Row]]]] = deque()
        self._scored: deque[tuple[Drawn, list[tuple[int, Row, int]]]] = deque()
        self._inbox: deque = deque()  # requests and tickets to abort, from other threads
        self._tickets = itertools.count()
        self._progress: dict[Sample, Progress] = {}
        self._samples: dict[int, list[Sample]] = {}

    def hold(self, weights, of_draft=None) -> None:
        """Takes the weights to compute with, and those of the draft, or lets go of them."""
        self.weights = weights
        if self.draft:
            self.draft.weights = of_draft

    # --- requests

    def submit(self, request: Request) -> int:
        """Takes a request; returns its ticket. Raises UserError for one that can never be answered."""
        self.check(request)
        ticket = next(self._tickets)
        self._inbox.append((ticket, request))
        return ticket

    def check(self, request: Request) -> None:
        """Raises UserError for a request that can never be answered."""
        vocab_size, length = self.programs.model.config.vocab_size, len(request.prompt)
        if not length or not all(0 <= i < vocab_size for i in request.prompt):
            raise UserError(f"a prompt has token ids for which the model has no embedding, or none at all: give ids from 0 to {vocab_size - 1}")
        if length > self.max_length:
            raise UserError(f"the prompt is {length} tokens long: the model's context holds {self.max_length}; shorten it")
        out_of_range = [i for i in (*request.sampling.logit_bias, *request.sampling.stop_ids) if i >= vocab_size]
        if out_of_range:
            raise UserError(f"logit_bias or stop_ids name token {out_of_range[0]}: the model's ids go up to {vocab_size - 1}")
        if request.grammar:
            self._grammars.compile(request.grammar)
        page_size, most = self.scheduler.pool.page_size, self.scheduler.pool.num_pages - 1
        if -(-self._limit(request) // page_size) > most:
            raise UserError(
                f"prompt and answer may take {self._limit(request)} tokens, and the cache holds {most * page_size}: ask for fewer new tokens, or give "
                "the engine a larger max_tokens_in_cache"
            )

    @functools.cached_property
    def _grammars(self) -> GrammarCompiler:
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer beside it, so no answer can follow a grammar: put the tokenizer's files into its directory")
        return GrammarCompiler(self.tokenizer, self.programs.model.config.vocab_size)

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
        return sum(map(len, self._samples.values())) + len(self._inbox)

    def knows(self, ticket: int) -> bool:
        """Returns whether a request has answers that have not ended."""
        return ticket in self._samples or any(ticket == waiting for waiting, _ in self._inbox)

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
            else:
                samples = [sample for sample in self._samples.get(ticket, ()) if not sample.done]
                ended += [event for sample in reversed(samples) for event in self._end(sample, "abort")]
        return ended

    def _queue(self, ticket: int, request: Request) -> None:
        limit, prompt = self._limit(request), object()
        for number in range(request.first_sample, request.first_sample + request.num_samples):
            finds = not request.scores_prompt
            sample = Sample(list(request.prompt), limit, request.salt, finds, request.scores_prompt and number == request.first_sample, prompt)
            stop = StopCondition(self.tokenizer, request.sampling, limit - len(request.prompt))
            guide = self._grammars.compile(request.grammar) if request.grammar else None
            self._progress[sample] = Progress(ticket, number, request, stop, guide)
            self._samples.setdefault(ticket, []).append(sample)
            self.scheduler.add([sample])

    # --- a step

    def step(self) -> list[Piece | Answer]:
        """Goes on by one step, and returns what is new."""
        events = self._take_in()
        self._admit()
        decoded, computed = self._decode(), self._prefill()
        events += self._look_at_drawn()
        for left, choose in ((decoded, self._choose_next), (computed, self._choose_first)):
            if left:
                choose(*left)
        return events

    def _admit(self) -> None:
        admitted = self.scheduler.admit()
        for some in (admitted[i : i + 16] for i in range(0, len(admitted), 16)):
            self._prepare(some)

    def _prepare(self, samples: list[Sample]) -> None:
        """Puts samples into their slots on the device."""
        rows = [self._row(sample) for sample in samples]
        number = bucket(len(samples))
        rows += rows[-1:] * (number - len(rows))
        numbers = [sample.slot for sample in samples] + [self.num_slots + 1] * (number - len(samples))
        put = self.programs.put
        self.slots = self.programs.prepare(self.slots, put(np.array(numbers, np.int32)), put(jax.tree.map(lambda *a: np.concatenate(a), *rows)))

    def _row(self, sample: Sample):
        progress = self._progress[sample]
        request = progress.request
        return row(
            request.sampling, sample.ids, sample.num_prompt, sample.limit, sample.pages, self.size, self.max_pages, sample.computed, progress.number,
            request.speculates and request.grammar is None,
        )  # fmt: skip

    def _decode(self):
        """Dispatches a decode step of the samples whose turn it is; returns what left the pipeline."""
        lane, turn = self._decoding, next(self._turns)
        samples = self.scheduler.ready(turn) if turn < self.scheduler.num_micro_batches else []
        verifies = self.num_guesses and (self._guesses_found or self.draft or self.programs.num_ranks > 1 or self.least_rows > 1)
        tokens, what = (1 + self.num_guesses, "all") if verifies else (1, "last")
        if not lane.is_empty and (lane.shape[1] != tokens or len(samples) > lane.shape[0]):
            return self._tick(lane, lane.shape, [])  # what is under way leaves first
        if not self.scheduler.reserve:
            samples = self._grow(samples)
        number = max(self.least_rows, bucket(len(samples))) if lane.is_empty else lane.shape[0]
        return self._tick(lane, (number, tokens, what), [Row(s, s.turn, s.slot, True, -1) for s in samples])

    def _grow(self, samples: list[Sample]) -> list[Sample]:
        grown = self.scheduler.grow(samples)
        if grown:
            number, put = bucket(len(grown)), self.programs.put
            numbers, tables = np.full(number, self.num_slots + 1, np.int32), np.zeros((number, self.max_pages), np.int32)
            for i, sample in enumerate(grown):
                numbers[i], tables[i, : len(sample.pages)] = sample.slot, sample.pages
            self.slots = self.programs.set_tables(self.slots, put(numbers), put(tables))
        return [sample for sample in samples if sample.slot is not None]

    def _prefill(self):
        """Dispatches the next chunk of prompts; returns what left the pipeline."""
        lane, chunk = self._prefilling, self.scheduler.next_chunk(self.chunks)
        if chunk is None:
            return self._tick(lane, lane.shape, [])
        number, tokens, samples = chunk
        shape = number, tokens, "prompt" if samples[0].scores else "last"
        if not lane.is_empty and lane.shape != shape:
            return self._tick(lane, lane.shape, [])
        rows = []
        for sample in samples:
            start = sample.computed
            rows.append(Row(sample, sample.turn, sample.slot, self.scheduler.compute(sample, tokens), start))
        return self._tick(lane, shape, rows)

    def _tick(self, lane: Lane, shape: Shape, rows: list[Row]) -> tuple[list[Row], Job, Any] | None:
        """Dispatches a forward, in which `rows` enter the pipeline; returns those that left it, with their job and what was found."""
        if not rows and lane.is_empty:
            return None
        lane.shape, programs = shape, self.programs
        carry = lane.carries.pop(shape, None) or programs.new_carry(*shape[:2])
        numbers = self._numbers(rows, shape[0])
        forward = programs.forward(*shape)
        self.pools, self.slots, lane.carries[shape], job, found = forward(self.weights, self.pools, self.slots, carry, programs.put(numbers))
        for entered in rows:
            self.scheduler.in_flight[entered.slot] += 1
        if self.draft and lane is self._prefilling:
            self.draft.follow(self.slots, job, shape[1])
        lane.under_way.append(rows)
        left = lane.under_way.popleft()
        for leaving in left or ():
            self.scheduler.in_flight[leaving.slot] -= 1
        return (left, job, found) if left else None

    def _numbers(self, rows: list[Row], number: int) -> np.ndarray:
        """Returns the slots of rows, and for padding and for those that are gone the one that is nobody's."""
        slots = [row.slot if row.lives else self.num_slots for row in rows]
        return np.array(slots + [self.num_slots] * (number - len(slots)), np.int32)

    def _choose_next(self, rows: list[Row], job: Job, logits) -> None:
        if any(row.lives for row in rows):
            self._sample(job, logits, np.arange(len(job.slot_B), dtype=np.int32), rows)

    def _choose_first(self, rows: list[Row], job: Job, found) -> None:
        """Draws the first tokens of samples whose prompts are computed, and of those that follow them."""
        if rows[0].sample.scores:
            found, scores = found
            self._scored.append((scores, [(i, row, min(row.sample.target - row.start, scores.ids.shape[1])) for i, row in enumerate(rows)]))
        first, places, copies = [], [], []
        for i, leading in enumerate(rows):
            if not leading.last or not leading.lives:
                continue
            followers = self.scheduler.lead(leading.sample)
            whole, rest = divmod(len(leading.sample.ids), self.scheduler.pool.page_size)
            copies += [(leading.sample.pages[whole], follower.pages[whole]) for follower in followers if rest]
            for sample in (leading.sample, *followers):
                first.append(Row(sample, sample.turn, sample.slot, True, -1))
                places.append(i)
        if not first:
            return
        put = self.programs.put
        if copies:
            sources, targets = np.full((2, bucket(len(copies))), BIN, np.int32)
            sources[: len(copies)], targets[: len(copies)] = zip(*copies)
            sources, targets = put(sources), put(targets)
            self.pools = self.programs.copy_pages(self.pools, sources, targets)
            if self.draft:
                self.draft.copy_pages(sources, targets)
        self._sample(job, found, np.array(places + [0] * (bucket(len(first)) - len(first)), np.int32), first)

    def _sample(self, job: Job, logits, places: np.ndarray, rows: list[Row]) -> None:
        put = self.programs.put
        numbers = put(self._numbers(rows, len(places)))
        self.slots, drawn = self.programs.sample(self.slots, job, logits, put(places), numbers, self._mask(rows, len(places)))
        if self.draft:
            self.slots = self.draft.guess(self.slots, numbers)
        drawn.ids.copy_to_host_async()
        living = [(i, row) for i, row in enumerate(rows) if row.lives]
        for _, row in living:
            row.sample.unseen += 1
        self._drawn.append((drawn, living))

    def _mask(self, rows: list[Row], number: int) -> jax.Array | None:
        """Returns the bits of the ids that may come in each row, where there is a grammar at all."""
        guides = {i: self._progress[row.sample].guide for i, row in enumerate(rows) if row.lives and self._progress[row.sample].guide}
        if not guides:
            return None
        mask = np.full((number, self._grammars.num_words), 2**32 - 1, np.uint32)
        for i, guide in guides.items():
            mask[i] = guide.mask()
        return self.programs.put(mask)

    # --- what the host sees

    def _look_at_drawn(self) -> list[Piece | Answer]:
        """Takes the tokens that were drawn in the step before; returns what they add to the answers, and the answers that they end."""
        while self._scored:
            scores, rows = self._scored.popleft()
            for i, row, count in rows:
                if row.lives:
                    self._progress[row.sample].prompt_log_probs += self._log_probs(row.sample, scores, i, scores.ids, count)
        events, self._guesses_found = [], self._guesses_found and not self._drawn
        while self._drawn:
            drawn, rows = self._drawn.popleft()
            ids = np.asarray(drawn.ids)
            for i, row in rows:
                if row.lives:
                    row.sample.unseen -= 1
                    self._guesses_found |= bool(ids[i, -1])
                    events += self._push(row.sample, drawn, i, ids[i, : ids[i, -2]].tolist())
        return events

    def _push(self, sample: Sample, drawn: Drawn, i: int, ids: list[int]) -> list[Piece | Answer]:
        progress = self._progress[sample]
        texts, used = [], 0
        for token in ids if not progress.stop.ended else ():  # of a prompt that fills the context nothing is drawn
            if token == NOT_FINITE:
                return self._end(sample, "error")
            sample.ids.append(token)
            texts.append(progress.stop.push(token))
            used += 1
            if progress.guide:
                progress.guide.take(token)
            if progress.stop.ended or (progress.guide and progress.guide.has_ended):
                progress.stop.reason = progress.stop.reason or "stop"
                break
        log_probs = self._log_probs(sample, drawn, i, drawn.ids, used) if progress.request.sampling.log_probs is not None else []
        progress.log_probs += log_probs
        if progress.stop.ended:
            texts.append(progress.stop.flush())
        text, ids = "".join(texts), tuple(ids[:used])
        progress.text.append(text)
        if progress.stop.ended:
            return self._end(sample, progress.stop.reason, text, ids, tuple(log_probs))
        return [Piece(progress.ticket, progress.number, text, ids, tuple(log_probs), None)]

    def _log_probs(self, sample: Sample, drawn: Drawn, i: int, ids, count: int) -> list[LogProb]:
        number = self._progress[sample].request.sampling.log_probs or 0
        tokens, log_p, likeliest = np.asarray(ids)[i], np.asarray(drawn.log_p)[i], np.asarray(drawn.likeliest)[i]
        size, found = likeliest.shape[-1], []
        for j in range(count):
            raw, processed = log_p[j, 2 : 2 + size].tolist(), log_p[j, 2 + size :].tolist()
            top = tuple(zip(likeliest[j].tolist(), raw, processed))[:number]
            found.append(LogProb(int(tokens[j]), float(log_p[j, 0]), float(log_p[j, 1]), top))
        return found

    def _end(self, sample: Sample, reason: str, text: str = "", ids: tuple[int, ...] = (), log_probs: tuple[LogProb, ...] = ()) -> list[Piece | Answer]:
        progress, num_found = self._progress.pop(sample), sample.num_found
        self.scheduler.finish(sample)
        others = self._samples[progress.ticket]
        others.remove(sample)
        if not others:
            del self._samples[progress.ticket]
        answer = Answer(
            progress.ticket, progress.request, progress.number, "".join(progress.text), tuple(sample.ids[sample.num_prompt :]),
            tuple(progress.log_probs), reason, progress.stop.found, num_found, tuple(progress.prompt_log_probs[: sample.num_prompt - 1]),
        )  # fmt: skip
        return [Piece(progress.ticket, progress.number, text, ids, log_probs, reason), answer]


def answers(engine, requests: Iterable[Request]) -> Iterator[Answer]:
    """Yields the answers of an engine as they end; an answer's `ticket` is its request's place among `requests`."""
    place: dict[int, int] = {}
    try:
        for i, request in enumerate(requests):
            place[engine.submit(request)] = i
        while any(map(engine.knows, place)):
            for event in engine.step():
                if isinstance(event, Answer) and event.ticket in place:
                    yield event.of(place[event.ticket])
    finally:
        for ticket in place:
            engine.abort(ticket)


def bucket(size: int) -> int:
    """Returns the smallest power of 2 that holds `size`, and at least 1."""
    return 1 << max(0, size - 1).bit_length()
