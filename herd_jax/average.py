"""Averages checkpoints, or models of several runs, in their weights.

    python -m herd_jax.average --source WORKDIR --last 10 --target DIR
    python -m herd_jax.average --source PATH PATH ... [--weights W W ...] --target DIR

PATH is what `herd_jax.convert` reads, or WORKDIR/checkpoints/STEP for one step of a run. Summed in FP64 and stored in FP32; weights are
divided by their sum. `herd_jax.load` and `--config.init_from` open the result.
"""

import argparse

import jax

from herd_jax.config import number
from herd_jax.errors import command_line
from herd_jax.interop.operations.average import average
from herd_jax.interop.save import FORMATS


@command_line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m herd_jax.average", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, nargs="+", metavar="PATH")
    parser.add_argument("--weights", nargs="+", type=number, default=(), metavar="W", help="one for each path; default: all models alike")
    parser.add_argument("--last", type=int, metavar="N", help="of each path, a workdir: its N newest checkpoints, in equal shares")
    parser.add_argument("--target", required=True, help="a new directory")
    parser.add_argument("--to", choices=FORMATS, default="herd", help="default: herd")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="default: float32")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed on devices
    for path, share in average(args.source, args.target, args.weights, args.last, args.to, args.dtype):
        print(f"{share:8.4f}  {path}")
    print(f"wrote {args.target}")


if __name__ == "__main__":
    main()
