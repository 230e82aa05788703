"""The batch ramp: a run as phases of global batch size and sequence length, and where in it a step stands (section 3.4.1 of the paper)."""

import dataclasses

from herd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase, which begins when `from_tokens` tokens are trained on: sequences a step, tokens a sequence, micro-batches a step."""

    from_tokens: int
    global_batch_size: int
    seq_len: int
    num_micro_batches: int

    def __post_init__(self):
        for name in ("global_batch_size", "seq_len", "num_micro_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}: it must be 1 or more")
        if self.global_batch_size % self.num_micro_batches:
            raise UserError(
                f"train.global_batch_size {self.global_batch_size} does not divide by train.num_micro_batches {self.num_micro_batches}: "
                "change one of them"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Phases in order. A phase begins at the first step before which at least its `from_tokens` have been trained on."""

    phases: tuple[Phase, ...]

    def __post_init__(self):
        starts = [phase.from_tokens for phase in self.phases]
        if starts[0] != 0 or any(later <= earlier for earlier, later in zip(starts, starts[1:])):
            raise UserError(f"train.phases start from {starts} tokens: the first must start from 0 and each later one from more than the one before")

    def first_steps(self) -> list[int]:
        """Returns the step at which each phase begins."""
        steps, tokens = [0], 0
        for before, phase in zip(self.phases, self.phases[1:]):
            num_steps = -(-(phase.from_tokens - tokens) // before.tokens_per_step)
            steps.append(steps[-1] + max(num_steps, 0))
            tokens += max(num_steps, 0) * before.tokens_per_step
        return steps

    def phase_at(self, step: int) -> Phase:
        """Returns the phase of step `step`, counted from 0."""
        return [phase for phase, first in zip(self.phases, self.first_steps()) if first <= step][-1]

    def tokens_before(self, step: int) -> int:
        """Returns the number of tokens trained on when `step` steps are done."""
        return sum(num_steps * phase.tokens_per_step for phase, num_steps in self._spans(step))

    def step_at(self, tokens: int) -> int:
        """Returns the first step before which at least `tokens` have been trained on; also the number of steps that it takes to train on them."""
        firsts = self.first_steps()
        for phase, first, end in zip(self.phases, firsts, [*firsts[1:], None]):
            step = first + max(0, -(-(tokens - self.tokens_before(first)) // phase.tokens_per_step))
            if end is None or step < end:
                return step
        raise AssertionError("the last phase has no end")

    def first_row(self, step: int) -> int:
        """Returns the index of the first row of step `step` among the rows of its sequence length."""
        return self.rows_before(step, self.phase_at(step).seq_len)

    def rows_before(self, step: int, seq_len: int) -> int:
        """Returns the number of rows of `seq_len` tokens among those of the first `step` steps."""
        return sum(num_steps * phase.global_batch_size for phase, num_steps in self._spans(step) if phase.seq_len == seq_len)

    def _spans(self, step: int) -> list[tuple[Phase, int]]:
        """Returns each phase with the number of its steps among the first `step`."""
        firsts = self.first_steps()
        ends = [*firsts[1:], step]
        return [(phase, max(0, min(step, end) - first)) for phase, first, end in zip(self.phases, firsts, ends)]
