"""Signals that ask a run to stop: noted when they come, obeyed between two steps, or at once where nothing is lost."""

import contextlib
import signal
from collections.abc import Iterator

from herd_jax.errors import StartAgain, UserError

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


@contextlib.contextmanager
def ending_at_once(where: str) -> Iterator[None]:
    """Lets a signal end what is done inside, which the next start repeats: it raises StartAgain, or UserError for a Ctrl-C."""

    def end(number, frame):
        if number == signal.SIGINT:
            raise UserError(f"interrupted {where}: the same command continues there")
        raise StartAgain(f"stopped {where}: the same command continues there")

    before = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
