"""`python -m herd_jax.goodput WORKDIR [--plot FILE]`: where the time of a run went, over all its starts.

The table is printed; the drawing goes to WORKDIR/goodput.png, or to FILE (.png or .svg). It needs `pip install -e '.[plot]'`.
"""

import argparse

from herd_jax.errors import command_line
from herd_jax.reliability.goodput import draw, read_goodput


@command_line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m herd_jax.goodput", description="Where the time of a training run went.")
    parser.add_argument("workdir", help="of the run")
    parser.add_argument("--plot", metavar="FILE", help="the drawing, .png or .svg (default: WORKDIR/goodput.png)")
    arguments = parser.parse_args(argv)
    goodput = read_goodput(arguments.workdir)
    print("\n".join(goodput.lines()))
    draw(goodput, arguments.plot or f"{arguments.workdir}/goodput.png")


if __name__ == "__main__":
    main()
