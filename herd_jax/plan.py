"""What a run will need and how fast it will be, before it is started.

    python -m herd_jax.plan --model llama3-405b --hardware h100 --tp 8 --pp 16 --dp 64 --batch-per-dp 32    one layout
    python -m herd_jax.plan --model llama3-405b --gpus 16384 --global-batch-tokens 16M --search             the fastest layouts
    python -m herd_jax.plan schedule --pp 4 --micro-batches 10 --chunks 2 --contiguous 5                    a pipeline schedule
    python -m herd_jax.plan goodput --gpus 16384 --days 54                                                  failures and checkpoints
"""

import argparse
import importlib.util
import json

from herd_jax.errors import UserError, command_line
from herd_jax.machines import hardware
from herd_jax.mesh import AXES
from herd_jax.models.config import ModelConfig
from herd_jax.models.llama import REMAT
from herd_jax.parallel.data import GATHER
from herd_jax.parallel.schedule import SCHEDULES, PipelineConfig
from herd_jax.planning import drawing, goodput, memory, report
from herd_jax.planning.job import Job, parse_tokens
from herd_jax.planning.search import search


@command_line
def main(argv: list[str]) -> None:
    commands = {"schedule": plan_schedule, "goodput": plan_goodput}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        plan_job(argv)


def plan_job(argv: list[str]) -> None:
    parser = make_parser("", __doc__)
    parser.add_argument("--model", required=True, help="by name, as model.name of a run")
    parser.add_argument("--hardware", default="h100", help=f"{', '.join(hardware.HARDWARE)} or cpu (default: h100)")
    for axis in AXES:
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--batch-per-dp", type=int, default=1, help="sequences a step on each dp rank")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="sequences of a micro-batch on each dp rank")
    parser.add_argument("--schedule", choices=SCHEDULES, help="default: interleaved as the paper has it, where the layers allow")
    add_pipeline_arguments(parser)
    parser.add_argument("--remat", default="none", choices=REMAT)
    parser.add_argument("--gather", default="step", choices=GATHER)
    parser.add_argument("--document-length", type=float, help="mean of the documents packed in a row (default: the row is one document)")
    parser.add_argument("--tokens", default="15.6T", help="budget for days and energy (default: 15.6T, the paper's)")
    parser.add_argument("--search", action="store_true", help="rank the layouts of --gpus with --global-batch-tokens instead")
    parser.add_argument("--gpus", type=int, help="with --search: number of devices")
    parser.add_argument("--global-batch-tokens", default="16M", help="with --search: tokens a step (default: 16M)")
    parser.add_argument("--plot-memory", metavar="FILE", help="draws memory by kind, .png or .svg")
    parser.add_argument("--plot-mfu", metavar="FILE", help="draws MFU over the number of devices, .png or .svg")
    args = parser.parse_args(argv)
    model, budget = ModelConfig(args.model).resolve(), parse_tokens(args.tokens)
    if args.search:
        if args.gpus is None:
            raise UserError("--search needs the number of devices: give it with --gpus")
        device, batch = hardware.look_up(args.hardware, args.gpus), parse_tokens(args.global_batch_tokens)
        found = search(args.model, model, device, args.gpus, batch, args.seq_len, memory.estimate, args.document_length)
        show(args, report.search_lines(found), report.search_dict(found, budget))
    else:
        mesh = {axis: getattr(args, axis) for axis in AXES}
        device = hardware.look_up(args.hardware, args.tp * args.cp * args.pp * args.dp)
        job = Job(
            args.model, model, device, **mesh, seq_len=args.seq_len, batch_per_dp=args.batch_per_dp, micro_batch_size=args.micro_batch_size,
            pipeline=pipeline_config(args), remat=args.remat, gather=args.gather, mean_document_length=args.document_length,
        )  # fmt: skip
        if args.schedule is None and args.chunks == 1:
            job = report.with_chosen_schedule(job)
        planned = report.plan(job, budget)
        show(args, planned.lines(), planned.to_dict())
        if args.plot_memory:
            drawing.draw_memory(planned.memory, device.memory_bytes, args.plot_memory)
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
    schedule = pipeline_config(args).build(args.pp, args.micro_batches)
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
    parser.add_argument("--days", type=float, default=54)
    parser.add_argument("--seeds", type=int, default=20, help="runs simulated (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="draws goodput over the checkpoint interval, .png or .svg")
    args = parser.parse_args(argv)
    simulated = goodput.report(args.gpus, args.days, args.seeds, args.seed)
    show(args, simulated.lines(), simulated.to_dict())
    if args.plot:
        goodput.draw(simulated, args.plot)


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m herd_jax.plan {command}".rstrip(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="prints JSON instead of text")
    return parser


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunks", type=int, default=1, help="stages of each rank")
    parser.add_argument("--contiguous", type=int, default=0, help="micro-batches that a chunk runs in a row (default: as many as ranks)")
    parser.add_argument("--overlap", action="store_true", help="messages travel during the tick that follows")


def pipeline_config(args) -> PipelineConfig:
    return PipelineConfig(args.schedule or ("1f1b" if args.chunks <= 1 else "interleaved"), args.chunks, args.contiguous, args.overlap)


def show(args, lines: list[str], values: dict) -> None:
    print(json.dumps(values) if args.json else "\n".join(lines))


if __name__ == "__main__":
    main()
