"""What a run will need and how fast it will be, before it is started.

    python -m herd_jax.plan --config configs/llama3_405b.py [--hardware h100]                               a run, as it is configured
    python -m herd_jax.plan --model llama3-405b --hardware h100 --tp 8 --pp 16 --dp 64 --batch-per-dp 32    one layout
    python -m herd_jax.plan --model llama3-405b --gpus 16384 --global-batch-tokens 16M --search             the fastest layouts
    python -m herd_jax.plan schedule --pp 4 --micro-batches 10 --chunks 2 --contiguous 5                    a pipeline schedule
    python -m herd_jax.plan goodput --gpus 16384 --days 54                                                  failures and checkpoints
    python -m herd_jax.plan validate                                                                        predictions and published runs
"""

import argparse
import dataclasses
import importlib.util
import json
import math
from typing import Any

from herd_jax.config import number, read_command_line
from herd_jax.errors import UserError, command_line
from herd_jax.machines import hardware
from herd_jax.mesh import AXES
from herd_jax.models.config import ModelConfig
from herd_jax.models.llama import REMAT
from herd_jax.parallel.data import GATHER
from herd_jax.parallel.schedule import SCHEDULES, PipelineConfig
from herd_jax.planning import drawing, goodput, memory, report, validation
from herd_jax.planning.job import Job, parse_tokens
from herd_jax.planning.run_phases import run_phases
from herd_jax.planning.search import search
from herd_jax.training.config import RunConfig


@command_line
def main(argv: list[str]) -> None:
    commands = {"schedule": plan_schedule, "goodput": plan_goodput, "validate": plan_validate}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        plan_job(argv)


def plan_job(argv: list[str]) -> None:
    parser = make_parser("", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="of a run: all below is as it says, but for flags that are given")
    what.add_argument("--model", help="by name, as model.name of a run")
    parser.add_argument("--hardware", default="h100", help=f"{', '.join(hardware.HARDWARE)} or cpu (default: h100)")
    for axis in AXES:
        parser.add_argument(f"--{axis}", type=int, help="devices along this axis of the mesh (default: 1)")
    parser.add_argument("--seq-len", type=int, help="tokens of a row (default: 8192)")
    parser.add_argument("--batch-per-dp", type=int, help="sequences a step on each dp rank (default: 1)")
    parser.add_argument("--micro-batch-size", type=int, help="sequences of a micro-batch on each dp rank (default: 1)")
    parser.add_argument("--schedule", choices=SCHEDULES, help="default: interleaved as the paper has it, where the layers allow")
    add_pipeline_arguments(parser)
    parser.add_argument("--remat", choices=REMAT, help="what the backward computes again (default: none)")
    parser.add_argument("--gather", choices=GATHER, help="how often FSDP gathers the weights (default: step)")
    parser.add_argument("--document-length", type=number, help="mean of the documents packed in a row (default: the row is one document)")
    parser.add_argument("--tokens", help="budget for days and energy (default: the run's own tokens, or 15.6T, the paper's)")
    parser.add_argument("--search", action="store_true", help="rank the layouts of --gpus with --global-batch-tokens instead")
    parser.add_argument("--gpus", type=int, help="with --search: number of devices (default: the run's own)")
    parser.add_argument("--global-batch-tokens", help="with --search: tokens a step (default: the run's own, or 16M)")
    parser.add_argument("--plot-memory", metavar="FILE", help="draws memory by kind, .png or .svg")
    parser.add_argument("--plot-mfu", metavar="FILE", help="draws MFU over the number of devices, .png or .svg")
    args = parser.parse_args(argv)
    names = (*AXES, "seq_len", "batch_per_dp", "micro_batch_size", "remat", "gather")
    given = {name: getattr(args, name) for name in names} | {"mean_document_length": args.document_length}
    given = {name: value for name, value in given.items() if value is not None}
    if args.config:
        config = read_command_line(RunConfig, ["--config", args.config])
        phases = run_phases(config, args.hardware, given, pipeline_flags(args))
        job, budget = phases[-1].job, sum(phase.tokens for phase in phases)
    else:
        model, num_devices = ModelConfig(args.model).resolve(), math.prod(given.get(axis, 1) for axis in AXES)
        pipeline = dataclasses.replace(PipelineConfig(), **pipeline_flags(args))
        job = Job(args.model, model, hardware.look_up(args.hardware, args.gpus or num_devices), **given, pipeline=pipeline)
        phases, budget = [], parse_tokens("15.6T")
        if args.schedule is None and args.chunks is None and not args.search:
            job = report.with_chosen_schedule(job)
    budget = parse_tokens(args.tokens) if args.tokens else budget
    if args.search:
        num_gpus = args.gpus or (job.num_devices if args.config else None)
        if num_gpus is None:
            raise UserError("--search needs the number of devices: give it with --gpus")
        batch = parse_tokens(args.global_batch_tokens) if args.global_batch_tokens else job.tokens_per_step if args.config else parse_tokens("16M")
        found = search(job.model_name, job.model, job.hardware, num_gpus, batch, job.seq_len, memory.estimate, job.mean_document_length)
        return show(args, report.search_lines(found), report.search_dict(found, budget))
    if args.gpus:
        raise UserError("--gpus goes with --search: without it the mesh says how many devices there are (--tp, --cp, --pp, --dp)")
    if args.global_batch_tokens:
        raise UserError("--global-batch-tokens goes with --search: without it give --batch-per-dp and --seq-len")
    planned, run = report.plan(job, budget), report.RunPlan.make(phases) if phases else None
    lines = (run.lines() if run else []) + planned.lines()
    show(args, lines, planned.to_dict() | ({"phases": run.to_dicts()} if run else {}))
    if args.plot_memory:
        drawing.draw_memory(planned.memory, job.hardware.memory_bytes, args.plot_memory)
    if args.plot_mfu:
        drawing.draw_mfu(report.mfu_over_devices(job), args.plot_mfu)


def plan_schedule(argv: list[str]) -> None:
    parser = make_parser("schedule", "Prints and draws which pipeline rank does what at which tick.")
    parser.add_argument("--pp", type=int, required=True, help="pipeline ranks")
    parser.add_argument("--micro-batches", type=int, required=True)
    parser.add_argument("--schedule", choices=SCHEDULES, help="default: 1f1b with one chunk, interleaved with more")
    add_pipeline_arguments(parser)
    parser.add_argument("--plot", metavar="FILE", help=".png or .svg (default: schedule.svg, where matplotlib is installed)")
    args = parser.parse_args(argv)
    flags = pipeline_flags(args)
    flags.setdefault("schedule", "1f1b" if flags.get("num_chunks", 1) <= 1 else "interleaved")
    schedule = PipelineConfig(**flags).build(args.pp, args.micro_batches)
    drawn = "no picture: it needs matplotlib, pip install -e '.[plot]'"
    if args.plot or importlib.util.find_spec("matplotlib"):
        path = args.plot or "schedule.svg"
        drawing.draw_schedule(schedule, path)
        drawn = f"drawn to {path}"
    peak = schedule.peak_in_flight.tolist()
    counts = {"num_ticks": len(schedule.operation), "bubble_fraction": schedule.bubble_fraction, "peak_in_flight": peak}
    lanes = {name: getattr(schedule, name).T.tolist() for name in ("operation", "micro_batch", "chunk")}
    show(args, [*drawing.schedule_text(schedule), drawn], counts | lanes)


def plan_goodput(argv: list[str]) -> None:
    parser = make_parser("goodput", "Simulates failures at the paper's rates: how much of the time is training, and how often to save.")
    parser.add_argument("--gpus", type=int, default=16_384)
    parser.add_argument("--days", type=number, default=54)
    parser.add_argument("--seeds", type=int, default=20, help="runs simulated (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="draws goodput over the checkpoint interval, .png or .svg")
    args = parser.parse_args(argv)
    simulated = goodput.report(args.gpus, args.days, args.seeds, args.seed)
    show(args, simulated.lines(), simulated.to_dict())
    if args.plot:
        goodput.draw(simulated, args.plot)


def plan_validate(argv: list[str]) -> None:
    parser = make_parser("validate", "Compares what is predicted with the speed of runs that others have published.")
    args = parser.parse_args(argv)
    found = [validation.compare(run) for run in validation.RUNS]
    show(args, validation.lines(found), validation.to_dicts(found))


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m herd_jax.plan {command}".rstrip(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="prints JSON instead of text")
    return parser


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunks", type=int, help="stages of each rank (default: 1)")
    parser.add_argument("--contiguous", type=int, help="micro-batches that a chunk runs in a row (default: at least as many as ranks)")
    parser.add_argument("--overlap", action="store_true", default=None, help="messages travel during the tick that follows")


def pipeline_flags(args) -> dict[str, Any]:
    """Returns the fields of PipelineConfig that were given; more chunks than one need a schedule that has them."""
    fields = {"schedule": args.schedule, "num_chunks": args.chunks, "contiguous_micro_batches": args.contiguous, "overlap": args.overlap}
    if args.schedule is None and (args.chunks or 1) > 1:
        fields["schedule"] = "interleaved"
    return {name: value for name, value in fields.items() if value is not None}


def show(args, lines: list[str], values: dict | list) -> None:
    print(json.dumps(values) if args.json else "\n".join(lines))


if __name__ == "__main__":
    main()
