"""Which sample gets a slot and pages, whose prompt is computed next, and who takes the next step. It knows no jax.

First come, first served: nobody overtakes the one who waits longest. By default a sample is admitted when the pages for its greatest length are
there, so that it never has to stop (the paper's rule). With `reserve` off it gets pages as it grows, so that more run together; when none are left,
the one admitted last goes back to the front of the queue, and its tokens are computed again later.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence

from herd_jax.inference.engine.pages import PagePool


@dataclasses.dataclass(eq=False)
class Sample:
    """One answer to a prompt. `ids` are prompt and answer, as far as the host has seen them; `limit` is the number of tokens at which it ends.

    Samples of one `prompt` (an object) that are admitted together are computed from one prefill: all but the first follow that one.
    """

    ids: list[int]
    limit: int
    salt: str = ""
    finds: bool = True  # whether it may begin on pages that are there already
    scores: bool = False  # whether the log-probabilities of its prompt are wanted
    prompt: object = None
    num_prompt: int = 0
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    num_found: int = 0  # tokens whose keys and values were there already
    target: int = 0  # tokens to compute before the next draw
    computed: int = 0  # of them, those that are there or under way
    leader: "Sample | None" = None  # whose prompt it waits for
    followers: list["Sample"] = dataclasses.field(default_factory=list)
    unseen: int = 0  # draws that the host has not seen, of one token or more each
    turn: int = 0  # number of times it was admitted or sent back: what began in another turn is not to be looked at
    micro_batch: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)

    @property
    def prefills(self) -> bool:
        """Returns whether its next step is a chunk of its prompt."""
        return self.leader is None and self.computed < self.target

    @property
    def may_go_on(self) -> bool:
        """Returns whether it has less than its limit even when all that is under way has ended."""
        return len(self.ids) + self.unseen < self.limit


@dataclasses.dataclass
class Scheduler:
    """`step_tokens`: the most tokens that a decode step of a sample may add. `num_micro_batches`: groups that take their decode steps in turn."""

    pool: PagePool
    num_slots: int
    step_tokens: int = 1
    reserve: bool = True
    num_micro_batches: int = 1

    def __post_init__(self) -> None:
        self.queue: deque[Sample] = deque()
        self.admitted: list[Sample] = []  # in the order of admission
        self.in_flight = [0] * self.num_slots  # forwards under way in each slot
        self.num_sent_back = 0
        self._free_slots = list(range(self.num_slots - 1, -1, -1))
        self._left: list[int] = []  # slots that samples have left, where a forward may still be under way

    def add(self, samples: Iterable[Sample]) -> None:
        self.queue.extend(samples)

    def admit(self) -> list[Sample]:
        """Returns the samples that now get a slot and pages; the first pages are those found, or the leader's."""
        for slot in [slot for slot in self._left if not self.in_flight[slot]]:
            self._left.remove(slot)
            self._free_slots.append(slot)
        admitted: list[Sample] = []
        while self.queue and self._free_slots:
            sample, leader = self.queue[0], None
            if admitted and sample.prompt is not None and sample.prompt is admitted[-1].prompt and sample.ids == admitted[-1].ids:
                leader = admitted[-1].leader or admitted[-1]
            if not self._place(sample, leader):
                break
            admitted.append(self.queue.popleft())
            self.admitted.append(sample)
        return admitted

    def _place(self, sample: Sample, leader: Sample | None) -> bool:
        """Gives a sample a slot and pages; returns whether there were enough."""
        size, whole = self.pool.page_size, len(sample.ids) // self.pool.page_size
        if leader is not None:
            shared = leader.pages[:whole]
        else:  # the last token is computed in any case, for what follows it
            shared = self.pool.find(sample.ids[:-1], sample.salt) if sample.finds else []
        self.pool.hold(shared)
        tokens = sample.limit if self.reserve else min(sample.limit, len(sample.ids) + self.step_tokens)
        missing = -(-tokens // size) - len(shared)
        spare = 0 if self.reserve else len(self.admitted)  # a page for each of the others, so that the newest is not sent back at once
        if missing + spare > self.pool.num_available:
            self.pool.give_back(shared)
            return False
        sample.pages = [*shared, *self.pool.take(missing)]
        sample.slot, sample.target, sample.turn = self._free_slots.pop(), len(sample.ids), sample.turn + 1
        sample.num_found = sample.computed = len(sample.ids) if leader else len(shared) * size
        if leader is not None:
            sample.leader = leader
            leader.followers.append(sample)
        loads = [sum(other.micro_batch == i for other in self.admitted) for i in range(self.num_micro_batches)]
        sample.micro_batch = loads.index(min(loads))
        return True

    def next_chunk(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int, list[Sample]] | None:
        """Returns rows, tokens a row, and the samples whose prompts are computed next, for one of the shapes (rows, tokens) there are.

        The shape is the smallest that holds the rest of the first sample's prompt, or the largest; with it go those behind it whose rest fits too.
        """
        waiting = [sample for sample in self.admitted if sample.prefills]
        if not waiting:
            return None
        rest = lambda sample: sample.target - sample.computed
        tokens = min((t for _, t in sizes if t >= rest(waiting[0])), default=max(t for _, t in sizes))
        rows = [number for number, t in sizes if t == tokens]
        fits = lambda sample: rest(sample) <= tokens and sample.scores == waiting[0].scores
        fitting = [waiting[0], *filter(fits, waiting[1:])][: max(rows)]
        return min(number for number in rows if number >= len(fitting)), tokens, fitting

    def compute(self, sample: Sample, tokens: int) -> bool:
        """Notes that the next tokens of a prompt are under way, so that their pages can be found; returns whether they were the last."""
        sample.computed = min(sample.target, sample.computed + tokens)
        self.pool.keep(sample.ids[: sample.computed], sample.salt, sample.pages)
        return sample.computed == sample.target

    def lead(self, leader: Sample) -> list[Sample]:
        """Returns the samples that followed one whose prompt is computed; they go on by themselves from here."""
        followers, leader.followers = leader.followers, []
        for sample in followers:
            sample.leader = None
        return followers

    def ready(self, micro_batch: int = 0) -> list[Sample]:
        """Returns the samples that can take a decode step."""
        runs = lambda s: s.leader is None and s.computed >= s.target and not self.in_flight[s.slot] and s.may_go_on
        return [sample for sample in self.admitted if sample.micro_batch == micro_batch and runs(sample)]

    def grow(self, samples: Sequence[Sample]) -> list[Sample]:
        """Gives samples the pages that their next step may need, and returns those that have new ones. Where there are none left, the sample that
        was admitted last is sent back, which may be one of them."""
        grown = []
        for sample in samples:
            while sample.slot is not None and (missing := self._missing(sample)) > self.pool.num_available:
                self.send_back(self.admitted[-1])
            if sample.slot is not None and missing > 0:
                sample.pages += self.pool.take(missing)
                grown.append(sample)
        return [sample for sample in grown if sample.slot is not None]

    def _missing(self, sample: Sample) -> int:
        most = min(sample.limit, len(sample.ids) + (sample.unseen + 1) * self.step_tokens)
        return max(0, -(-most // self.pool.page_size) - len(sample.pages))

    def send_back(self, sample: Sample) -> None:
        """Puts a sample at the front of the queue, with what the host has seen of its answer."""
        self._leave(sample)
        sample.turn, sample.unseen, sample.computed = sample.turn + 1, 0, 0
        self.queue.appendleft(sample)
        self.num_sent_back += 1

    def finish(self, sample: Sample) -> None:
        """Ends a sample, wherever it is. Its pages are free at once, its slot when no forward is under way in it."""
        if not sample.done and sample.slot is None:
            self.queue.remove(sample)
        elif not sample.done:
            self._leave(sample)
        sample.done = True

    def _leave(self, sample: Sample) -> None:
        assert not sample.followers, "those that follow were admitted later, and leave before it"
        if sample.leader is not None:
            sample.leader.followers.remove(sample)
        self.admitted.remove(sample)
        self.pool.give_back(sample.pages)
        self._left.append(sample.slot)
        sample.pages, sample.leader, sample.slot = [], None, None
