"""Signals that ask a run to stop: noted when they come, obeyed between two steps."""

import contextlib
import signal
from collections.abc import Iterator

INTERRUPT, START_AGAIN = 1, 2  # the higher one wins
_SIGNALS = {signal.SIGINT: INTERRUPT, signal.SIGTERM: START_AGAIN, signal.SIGUSR1: START_AGAIN}


class Signals:
    """Notes SIGINT (Ctrl-C), SIGTERM and SIGUSR1 instead of dying of them in the middle of a step, which could strike after the step has
    taken the state and before it has given it back.

    A second Ctrl-C raises KeyboardInterrupt; a repeated SIGTERM or SIGUSR1, which schedulers send to everyone at once, changes nothing.
    """

    def __init__(self) -> None:
        self.seen = 0

    @contextlib.contextmanager
    def noted(self) -> Iterator["Signals"]:
        """Takes the signals' handlers over (after `jax.distributed.initialize`, which installs one) and gives them back in the end."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number, frame) -> None:
        if number == signal.SIGINT and self.seen:
            raise KeyboardInterrupt
        self.seen = max(self.seen, _SIGNALS[number])
