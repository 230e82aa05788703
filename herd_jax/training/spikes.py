"""What happens when the loss or the norm of the gradient is not finite or jumps: `train.on_spike`.

A step is bad where one of the two is not finite, or above the median + `train.spike_factor` x the interquartile range of its last
`train.spike_window` finite values, up to the value of two steps before: those are always known when the step is given to the devices, so that
a run decides the same whether it was interrupted or not. They, and the steps left out, are kept in checkpoints.
Values of bad steps count as well, so a lasting change of level is accepted once it fills half of the window.

- `stop`: the run ends at the bad step, with an error.
- `skip`: a bad step changes the count of steps and nothing else.
- `rewind`: the run goes back to the last multiple of `checkpoint.every_steps`, leaves out all batches from there to the bad one, and goes
  on after it with the same batches as ever, because a batch is a function of (seed, step). Where the checkpoint of that multiple is gone,
  an earlier one is taken and the steps between are taken again. More than MAX_REWINDS rewinds to one step end the run.
"""

import math
from typing import Any

import jax
import numpy as np

from herd_jax.errors import UserError
from herd_jax.training.state import State

ON_SPIKE = ("stop", "skip", "rewind")
MAX_REWINDS = 3
LAG = 2  # step k is judged by the values of steps up to k - LAG


@jax.jit
def _advance(step: jax.Array, num_steps: int) -> jax.Array:
    return step + num_steps


class Spikes:
    """Judges the steps of a run in their order; `position` is that of the checkpoint from which it goes on."""

    def __init__(self, on_spike: str, factor: float, window: int, position: dict) -> None:
        self.on_spike, self._factor, self._window = on_spike, factor, window
        self._rewinds: dict[int, int] = {}  # step -> how many times the run was rewound to it
        self.load(position)

    @property
    def limits_steps(self) -> bool:
        """Returns whether the devices have to be given limits: what is not finite they find by themselves."""
        return self.on_spike == "skip" and self._factor < math.inf

    def limits(self, step: int) -> np.ndarray:
        """Returns float32 [2]: the highest loss and norm of the gradient at which the step is not bad."""
        known = [values for at, *values in self._recent if at <= step - LAG][-self._window :]
        if self._factor == math.inf or len(known) < self._window:
            return np.full(2, np.inf, np.float32)
        low, median, high = np.quantile(np.array(known), (0.25, 0.5, 0.75), axis=0)
        return (median + self._factor * (high - low)).astype(np.float32)

    def judge(self, step: int, metrics: dict) -> str | None:
        """Returns what is wrong with a step that is done, in words that follow "the loss or its gradient is"; None for nothing."""
        limits, values = self.limits(step), np.array([float(metrics["loss"]), float(metrics["grad_norm"])], np.float32)
        if not np.isfinite(values).all():
            return f"not finite at step {step}"
        self._recent = [*self._recent, (step, *map(float, values))][-(self._window + LAG) :]
        if (values > limits).any():
            loss, norm = (f"{value:.4g} (limit {limit:.4g})" for value, limit in zip(values, limits, strict=True))
            return f"a spike at step {step}: loss {loss}, norm {norm}"
        return None

    def note_skipped(self, first: int, last: int) -> None:
        """Notes that the batches of steps `first` to `last` were left out."""
        if self._skipped and self._skipped[-1][1] == first - 1:
            self._skipped[-1][1] = last
        else:
            self._skipped.append([first, last])

    def leave_out(self, state: State, first: int, last: int) -> State:
        """Returns the state as one that has left out the batches of steps `first` to `last`."""
        self.note_skipped(first, last)
        return state._replace(step=_advance(state.step, last + 1 - first))

    def rewind_to(self, step: int, wrong: str) -> None:
        """Counts a rewind; raises UserError where that step has been rewound to often enough."""
        self._rewinds[step] = self._rewinds.get(step, 0) + 1
        if self._rewinds[step] > MAX_REWINDS:
            raise UserError(
                f"the loss or its gradient is {wrong}, after {MAX_REWINDS} rewinds to step {step}: "
                "lower optimizer.peak_learning_rate and give --config.resume.allow=optimizer.peak_learning_rate, or look at the data"
            )

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: {} where no rule but finiteness is set and nothing was left out."""
        recent = {"recent": [list(values) for values in self._recent]} if self._factor < math.inf else {}
        return recent | ({"skipped": [list(span) for span in self._skipped]} if self._skipped else {})

    def load(self, position: dict) -> None:
        """Goes on from the checkpoint at `position`."""
        self._recent = [tuple(values) for values in position.get("recent", [])]
        self._skipped = [list(span) for span in position.get("skipped", [])]  # [first, last], in steps
