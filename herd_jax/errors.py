"""Errors that a user can mend, and how a command reports them: one sentence, no traceback, non-zero exit."""

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend; its text is one sentence that names the cause and the remedy."""


def command_line(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Wraps `main(argv)` of an entry point: a UserError becomes one line on stderr and exit status 1; all else keeps its traceback."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main(sys.argv[1:])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    return run
