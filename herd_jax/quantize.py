"""Quantizes a model to FP8, as the paper serves its 405B: the feed-forward of all layers but the first and the last, row by row.

    python -m herd_jax.quantize --source PATH --target DIR [--to herd|huggingface]

PATH is what `herd_jax.convert` reads. Everything else is written as it is. `herd_jax.load` opens the result, and with `--to huggingface`
so do transformers and vLLM (as fbgemm_fp8, which needs a GPU there).
"""

import argparse

import jax

from herd_jax.errors import command_line
from herd_jax.interop.operations.quantize import quantize


@command_line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m herd_jax.quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True, help="a new directory")
    parser.add_argument("--to", choices=("herd", "huggingface"), default="herd", help="default: herd")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # little is computed
    quantize(args.source, args.target, args.to)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    main()
