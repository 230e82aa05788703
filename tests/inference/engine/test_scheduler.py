"""The scheduler and its pages without jax: random traces of arrivals, lengths, aborts and shared beginnings."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from herd_jax.inference.engine.pages import PagePool
from herd_jax.inference.engine.scheduler import Sample, Scheduler

PAGE, PAGES = 4, 13
CHUNKS = [(1, 4), (3, 4), (1, 16)]


class Machine:
    """Does to a scheduler what the engine does, with a pipeline of `depth` ranks, and checks what must always hold."""

    def __init__(self, reserve: bool, step_tokens: int, depth: int) -> None:
        self.pool = PagePool(PAGES, PAGE)
        self.scheduler = Scheduler(self.pool, 4, step_tokens, reserve, depth)
        self.decoding, self.prefilling = [[] for _ in range(depth - 1)], [[] for _ in range(depth - 1)]
        self.arrived: list[Sample] = []
        self.first_admitted: list[Sample] = []
        self.content: dict[int, tuple] = {}  # of each page, the ids up to its end
        self.turn = 0

    def arrive(self, ids, new_tokens, number) -> None:
        prompt = object()
        samples = [Sample(list(ids), len(ids) + new_tokens, prompt=prompt) for _ in range(number)]
        self.scheduler.add(samples)
        self.arrived += samples

    def check(self) -> None:
        held = Counter(page for sample in self.scheduler.admitted for page in sample.pages)
        assert all(self.pool.holders(page) == held[page] for page in range(PAGES)) and 0 not in held
        assert self.pool.num_held == len(held) and self.pool.num_held + self.pool.num_available == PAGES - 1
        slots = [sample.slot for sample in self.scheduler.admitted] + self.scheduler._free_slots + self.scheduler._left
        assert sorted(slots) == list(range(4))
        assert list(self.scheduler.queue) == [sample for sample in self.arrived if sample in self.scheduler.queue]
        for sample in self.scheduler.admitted:
            if self.scheduler.reserve:
                assert len(sample.pages) * PAGE >= sample.limit
            for number, page in enumerate(sample.pages):
                if self.pool.holders(page) > 1:  # only whole pages of equal beginnings are shared
                    assert (number + 1) * PAGE <= sample.target

    def step(self) -> None:
        scheduler = self.scheduler
        for sample in scheduler.admit():
            assert not scheduler.in_flight[sample.slot], "a forward is under way in the slot"
            if sample not in self.first_admitted:
                self.first_admitted.append(sample)
            if sample.leader is None:
                for number in range(sample.num_found // PAGE):  # what is found holds what it should
                    assert self.content[sample.pages[number]] == tuple(sample.ids[: (number + 1) * PAGE])
        self.check()
        depth = scheduler.num_micro_batches
        ready = scheduler.ready(self.turn % depth)
        self.turn += 1
        if not scheduler.reserve:
            scheduler.grow(ready)
            ready = [sample for sample in ready if sample.slot is not None]
        decoded = self.enter(self.decoding, [(sample, sample.turn, sample.slot, True) for sample in ready])
        chunk, rows = scheduler.next_chunk(CHUNKS), []
        if chunk:
            number, tokens, samples = chunk
            assert 0 < len(samples) <= number
            for sample in samples:
                start = sample.computed
                last = scheduler.compute(sample, tokens)
                for page in range(start // PAGE, sample.computed // PAGE):
                    self.content[sample.pages[page]] = tuple(sample.ids[: (page + 1) * PAGE])
                rows.append((sample, sample.turn, sample.slot, last))
        computed = self.enter(self.prefilling, rows)
        for sample, turn, slot, last in computed:
            if last and sample.turn == turn and not sample.done:
                for one in [sample, *scheduler.lead(sample)]:
                    self.draw(one, 1)
        for sample, turn, slot, _ in decoded:
            if sample.turn == turn and not sample.done:
                self.draw(sample, 1 + hash((len(sample.ids), slot)) % scheduler.step_tokens)
        self.check()

    def enter(self, lane, rows):
        for *_, slot, _ in rows:
            self.scheduler.in_flight[slot] += 1
        lane.append(rows)
        left = lane.pop(0)
        for *_, slot, _ in left:
            self.scheduler.in_flight[slot] -= 1
        return left

    def draw(self, sample: Sample, number: int) -> None:
        number = min(number, sample.limit - len(sample.ids))
        assert len(sample.ids) + number - 1 <= len(sample.pages) * PAGE
        sample.ids += [100 + len(sample.ids)] * number
        if len(sample.ids) == sample.limit:
            self.scheduler.finish(sample)


events = st.one_of(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 12), st.integers(1, 5)),  # ids, new tokens, samples
    st.integers(0, 30),  # abort one of those that came
    st.none(),  # a step
)


@settings(max_examples=150, deadline=None)
@given(st.lists(events, max_size=40), st.booleans(), st.integers(1, 4), st.integers(1, 3))
def test_traces(trace, reserve, step_tokens, depth):
    machine = Machine(reserve, step_tokens, depth)
    for event in trace:
        if event is None:
            machine.step()
        elif isinstance(event, int):
            for sample in machine.arrived[event : event + 1]:  # with all samples of its prompt, the last first
                for one in reversed([other for other in machine.arrived if other.prompt is sample.prompt]):
                    machine.scheduler.finish(one)
        else:
            machine.arrive(*event)
        machine.check()
    waited = [sample for sample in machine.arrived if not sample.done]
    for _ in range(60 * len(waited) + 10):
        machine.step()
    assert all(sample.done for sample in machine.arrived), "somebody starves"
    assert machine.pool.num_held == 0 and not machine.scheduler.queue
    order = [sample for sample in machine.arrived if sample in machine.first_admitted]
    assert machine.first_admitted == order, "somebody was overtaken"


def test_pages_are_found_by_content_and_forgotten_last_used_first():
    pool = PagePool(5, 2)
    a = pool.take(2)
    pool.keep([1, 2, 3, 4, 5], "", a)
    assert pool.find([1, 2, 3, 4, 9], "") == a and pool.find([1, 2, 9, 4], "") == a[:1]
    assert pool.find([1, 2, 3, 4], "other tenant") == [] and pool.find([3, 4], "") == []
    pool.give_back(a)
    assert pool.num_available == 4 and pool.find([1, 2, 3, 4], "") == a
    b = pool.take(3)  # the end of a sequence goes before its beginning
    assert a[1] in b and pool.find([1, 2, 3, 4], "") == a[:1]
    pool.give_back(b)
    assert pool.num_held == 0


def test_a_hash_alone_does_not_find_a_page(monkeypatch):
    pool = PagePool(4, 2)
    monkeypatch.setattr(PagePool, "_chain", lambda self, ids, salt: [(b"same", bytes(ids))])
    pool.keep([1, 2], "", pool.take(1))
    assert len(pool.find([1, 2], "")) == 1 and pool.find([3, 4], "") == []


@pytest.mark.parametrize(("lengths", "shape"), [((3,), (1, 4, 1)), ((3, 2, 4, 1), (3, 4, 3)), ((4, 9, 2), (3, 4, 2)), ((40, 2), (1, 16, 1))])
def test_chunks_take_as_many_prompts_as_fit(lengths, shape):
    scheduler = Scheduler(PagePool(200, PAGE), 8)
    scheduler.add([Sample(list(range(length)), length + 1) for length in lengths])
    scheduler.admit()
    number, tokens, samples = scheduler.next_chunk(CHUNKS)
    assert (number, tokens, len(samples)) == shape and samples[0].num_prompt == lengths[0]


def test_a_slot_is_free_when_no_forward_is_under_way_in_it():
    scheduler = Scheduler(PagePool(20, PAGE), 1)
    first, second = Sample([1, 2], 5), Sample([3], 5)
    scheduler.add([first, second])
    assert scheduler.admit() == [first]
    scheduler.in_flight[0] += 1
    scheduler.finish(first)
    assert scheduler.admit() == [] and scheduler.pool.num_held == 0
    scheduler.in_flight[0] -= 1
    assert scheduler.admit() == [second]
