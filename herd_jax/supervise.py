"""`python -m herd_jax.supervise [--give-up-after N] [--backoff SECONDS] -- python -m herd_jax.train --config FILE ...`: keeps a run going.

Starts the command again after crashes, hangs and preemption, until the run is done or N failures in a row bring no further step. An error
of the user before the first step is passed through. Incidents are in WORKDIR/incidents.jsonl, and a table is printed in the end.
The command may be a launcher; from its first `--config` on, it has the arguments of `herd_jax.train`.
"""

import argparse
import sys

from herd_jax.config import number, read_command_line
from herd_jax.errors import UserError, command_line
from herd_jax.reliability.supervisor import Supervisor
from herd_jax.training.config import RunConfig


@command_line
def main(argv: list[str]) -> None:
    options, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    prog = "python -m herd_jax.supervise"
    parser = argparse.ArgumentParser(prog=prog, usage="%(prog)s [options] -- COMMAND", description="Keeps a run going.")
    parser.add_argument("--give-up-after", type=int, default=5, metavar="N", help="failures in a row without a further step (default 5)")
    wait = "wait before a restart, doubled with each such failure (default 5)"
    parser.add_argument("--backoff", type=number, default=5.0, metavar="SECONDS", help=wait)
    arguments = parser.parse_args(options)
    begin = next((i for i, argument in enumerate(command) if argument.startswith("--config")), None)
    if begin is None:
        raise UserError("no command with a --config is named: give -- python -m herd_jax.train --config FILE")
    config = read_command_line(RunConfig, command[begin:])
    sys.exit(Supervisor(command, config.directory, arguments.give_up_after, arguments.backoff).run())


if __name__ == "__main__":
    main()
