"""Errors that a user can mend, and how a command reports them: one sentence, no traceback, and an exit status that says what to do."""

import functools
import os
import select
import sys
from collections.abc import Callable
from typing import IO

USER_ERROR = 1  # mend something; also any other error, with its traceback
START_AGAIN = 75  # EX_TEMPFAIL: the run was told to stop and has saved; the same command continues it
HUNG = 76  # the watchdog ended the process; the same command continues the run
PEER_LOST = 77  # another process of the run died or failed; the same command, in all of them, continues the run
MISCOMPUTED = 78  # a device computes wrongly: not to be started again before someone has looked at it
OCCUPIED = 79  # another command writes into the same directory


class UserError(ValueError):
    """Something the user can mend; its text is one sentence that names the cause and the remedy."""

    status = USER_ERROR  # the exit status of the program


class Miscomputed(UserError):
    """A device has given another result than it gave before, or than another device gave for the same work."""

    status = MISCOMPUTED


class Occupied(UserError):
    """Another command is writing where this one was told to write."""

    status = OCCUPIED


class FailedAlone(UserError):
    """This process has failed while the others, which do not know it, wait for it: all have to end, and the same command goes on."""

    status = PEER_LOST


class StartAgain(Exception):
    """The run has ended where the same command goes on, such as when the scheduler wants the machine back; its text is one sentence."""


def command_line(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Wraps `main(argv)` of an entry point: a UserError becomes one line on stderr and its exit status (1, unless its class has another),
    StartAgain one line and 75, nobody left to read the output (head) nothing and 1; all else keeps its traceback."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main(sys.argv[1:])
            sys.stdout.flush()
        except BrokenPipeError:
            if not _is_closed(sys.stdout):  # then it is another pipe or a connection, of which nobody must lose sight
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
            sys.exit(USER_ERROR)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.status)
        except StartAgain as notice:
            print(notice, file=sys.stderr)
            sys.exit(START_AGAIN)

    return run


def _is_closed(output: IO) -> bool:
    """Returns whether `output` goes into a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(output.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
