"""Reads a model in any known format and writes it in another.

    python -m herd_jax.convert --source PATH --target DIR [--to herd|huggingface|meta] [--dtype bfloat16|float32] [--tp N]

PATH is a Hugging Face directory, a Meta directory, a GGUF file, the workdir of a training run (its newest checkpoint), or a directory that
this command wrote with `--to herd`. Several processes that a launcher starts, as it starts those of herd_jax.train, write together.
"""

import argparse

import jax

from herd_jax.errors import UserError, command_line
from herd_jax.interop.save import FORMATS, convert
from herd_jax.machines.place import joined


@command_line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m herd_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True, help="a new directory")
    parser.add_argument("--to", choices=FORMATS, default="herd", help="default: herd")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as stored")
    parser.add_argument("--tp", type=int, default=1, help="with --to meta: a file for each of so many ranks of tensor parallelism (default: 1)")
    args = parser.parse_args(argv)
    if args.tp != 1 and args.to != "meta":
        raise UserError(f"--tp {args.tp} is for --to meta, whose files belong to ranks: leave it out")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    with joined(vars(args)):
        convert(args.source, args.target, args.to, args.dtype, args.tp)
        if jax.process_index() == 0:
            print(f"wrote {args.target}")


if __name__ == "__main__":
    main()
