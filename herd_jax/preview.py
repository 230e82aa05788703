"""Shows the first examples of a post-training run, each token coloured by its role and marked where it counts in the loss.

    python -m herd_jax.preview CONFIG [--stage sft|reward|dpo] [--examples N] [--config.FIELD=VALUE ...]

CONFIG is a file of `python -m herd_jax.post_train`; where it gives a dict, --stage says of which command.
"""

import argparse

from rich.console import Console

from herd_jax.config import kind_of_file, read_command_line
from herd_jax.errors import UserError, command_line
from herd_jax.post_training.config import STAGES
from herd_jax.post_training.preview import legend, preview


@command_line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m herd_jax.preview", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="of each source; default: 3")
    args, overrides = parser.parse_known_args(argv)
    kind = STAGES[args.stage] if args.stage else kind_of_file(args.config)
    if kind not in STAGES.values():
        raise UserError(f"{args.config} gives no config of post-training: say of which stage it is with --stage {', '.join(STAGES)}")
    console = Console(soft_wrap=True)
    for text in [legend(), *preview(read_command_line(kind, ["--config", args.config, *overrides]), args.examples)]:
        console.print(text)


if __name__ == "__main__":
    main()
