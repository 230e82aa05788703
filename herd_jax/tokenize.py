"""`python -m herd_jax.tokenize`: makes token streams for training from text files."""

import argparse

from herd_jax.config import number
from herd_jax.data.tokenization import tokenize_files
from herd_jax.errors import command_line


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m herd_jax.tokenize", description=__doc__)
    parser.add_argument(
        "--source", action="append", required=True, nargs="+", metavar="GLOB",
        help="files, directories or quoted globs (** goes down) of text, .jsonl, .jsonl.gz or .parquet; may be repeated",
    )  # fmt: skip
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tokenizer", metavar="NAME_OR_PATH", help='"bytes", a tokenizer file, or a directory that holds one')
    kind.add_argument("--train-tokenizer", type=int, metavar="VOCAB", help="train SentencePiece of this size on the sources")
    parser.add_argument("--target", required=True, metavar="DIR", help="gets train/, validation/ and tokenizer/")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column with the text (default: text)")
    parser.add_argument("--validation-fraction", type=number, default=0.01, metavar="F", help="documents held out (default: 0.01)")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one a CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run made in DIR")
    args = parser.parse_args(argv)
    summary = tokenize_files(
        [source for group in args.source for source in group],
        args.tokenizer or args.train_tokenizer,
        args.target,
        text_field=args.text_field,
        validation_fraction=args.validation_fraction,
        processes=args.processes,
        overwrite=args.overwrite,
    )
    print(summary)


if __name__ == "__main__":
    command_line(main)()
