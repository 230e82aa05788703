"""Claim: a pipeline schedule takes the time that the simulator says and the memory that the planner says; 1F1B's memory does not grow with M;
interleaving has a smaller bubble than 1F1B, and zero bubble a smaller one than both.

    python benchmarks/pipeline.py time      # each schedule, run by the executor on fake devices whose layers wait instead of computing
    python benchmarks/pipeline.py work      # one step of a real model: what each schedule's own work costs where cores are shared
    python benchmarks/pipeline.py memory    # activations and total, predicted and as compiled, over M

Fake devices of one machine share its cores: while one waits in a bubble, another computes faster, so the time of real layers says nothing
about a schedule. Layers that wait a fixed time need no core; all else (tables, executor, exchanges) is what trains.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from herd_jax.machines.hardware import HARDWARE
from herd_jax.mesh import MeshConfig, make_mesh, request_cpu_devices
from herd_jax.models.config import MODELS
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.parallel import pipeline
from herd_jax.parallel.schedule import PipelineConfig
from herd_jax.parallel.table import lower
from herd_jax.planning import memory
from herd_jax.planning.job import Job
from herd_jax.planning.simulator import Costs, simulate
from herd_jax.training.next_token import NEXT_TOKEN
from herd_jax.training.optimizer import OptimizerConfig, make_optimizer
from herd_jax.training.state import StatePlan
from herd_jax.training.step import Steps

SCHEDULES = {
    "gpipe": PipelineConfig("gpipe"),
    "1f1b": PipelineConfig("1f1b"),
    "interleaved, 2 chunks": PipelineConfig("interleaved", 2),
    "interleaved, 4 chunks": PipelineConfig("interleaved", 4),
    "zero bubble": PipelineConfig("zero_bubble"),
    "zero bubble, 2 chunks": PipelineConfig("zero_bubble", 2),
}
LAYERS_OF_A_RANK, WAIT = 4, 10e-3  # seconds of a forward, of a gradient of the input, and of one of the weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "work", "memory"])
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    request_cpu_devices(MeshConfig(pp=args.pp, dp=1))
    {"time": measure_time, "work": measure_work, "memory": measure_memory}[args.what](args)


def measure_time(args):
    wait, message = seconds_of_a_wait(args), seconds_of_an_exchange(args)
    print(f"{args.pp} ranks, {args.micro_batches} micro-batches, {LAYERS_OF_A_RANK} layers a rank; a wait of {WAIT * 1e3:g} ms takes {wait * 1e3:.2f} ms,")
    print(f"an exchange between neighbours, which all ranks wait for at every tick, {message * 1e3:.2f} ms")
    print(f"{'':24}{'bubble of ticks':>18}{'predicted ms':>14}{'measured ms':>13}{'ratio':>7}{'bubble predicted':>18}{'measured':>10}")
    for name, config in SCHEDULES.items():
        layers = (LAYERS_OF_A_RANK // config.num_chunks,) * (args.pp * config.num_chunks)
        schedule = config.build(args.pp, args.micro_batches)
        timeline = simulate(lower(schedule, layers), Costs(wait, 2 * wait, wait, wait, message=message), barrier=True)
        predicted, busy = timeline.duration, timeline.work.sum() / args.pp
        measured = statistics.median(seconds_of_a_step(waiting_step(args, config, layers, WAIT), args.repeats))
        print(
            f"{name:24}{schedule.bubble_fraction:>18.1%}{predicted * 1e3:>14.0f}{measured * 1e3:>13.0f}{measured / predicted:>7.2f}"
            f"{predicted / busy - 1:>18.1%}{measured / busy - 1:>10.1%}"
        )


def waiting_step(args, config: PipelineConfig, layers_per_stage, seconds: float):
    """A step of the executor whose layers wait: a function without arguments."""

    @jax.custom_vjp
    def layer(w, x):
        return wait(x, seconds) * w

    def backward(residuals, dy):
        w, x = residuals
        return jnp.sum(wait(dy * x, seconds)), wait(dy, seconds) * w

    layer.defvjp(lambda w, x: (layer(w, x), (w, x)), backward)
    head = lambda ends, x, m: (jnp.sum(x) * ends["head"], {"loss": jnp.sum(x)})
    program = pipeline.Program(lambda ends, m: m * ends["embed"], lambda w, x, m: layer(w, x), head, ("embed",), ("head",), layers_per_stage)

    def step(layers, micro_batches):
        ends = {"embed": jnp.ones(()), "head": jnp.ones(())}
        schedule = config.build(args.pp, args.micro_batches)
        sums, _, gradient = pipeline.value_and_gradient(program, ends, layers, micro_batches, schedule, pipeline.Exchange())
        return sums, gradient

    mesh = make_mesh(MeshConfig(pp=args.pp, dp=1))
    specs = (PartitionSpec("pp"), PartitionSpec())
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[::-1], check_vma=False))
    arguments = (jnp.ones(program.layer_slots() * len(layers_per_stage)), jnp.ones((args.micro_batches, 1, 2, 8)))
    return lambda: mapped(*arguments)


def wait(x, seconds: float):
    """`x`, so much later."""
    return jax.pure_callback(lambda x: (time.sleep(seconds), x)[1], jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def seconds_of_a_wait(args, rounds: int = 50) -> float:
    """What a wait takes with the call to the host, on all devices at once."""
    mesh = make_mesh(MeshConfig(pp=args.pp, dp=1))
    many = lambda x: jax.lax.fori_loop(0, rounds, lambda i, x: wait(x, WAIT), x)
    mapped = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False))
    return statistics.median(seconds_of_a_step(lambda: mapped(jnp.ones((1, 2, 8))), 3)) / rounds


def seconds_of_an_exchange(args) -> float:
    """Of a tick in which no layer runs: what the executor itself takes."""
    config, args = PipelineConfig("gpipe"), argparse.Namespace(**{**vars(args), "micro_batches": 200})
    num_ticks = len(config.build(args.pp, args.micro_batches).operation)
    return statistics.median(seconds_of_a_step(waiting_step(args, config, (0,) * args.pp, 0.0), 5)) / num_ticks


def seconds_of_a_step(step, repeats: int) -> list[float]:
    jax.block_until_ready(step())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_work(args):
    model, seq_len = dataclasses.replace(MODELS["llama-5m"], num_layers=14), 256
    print(f"llama-5m with {model.num_layers} layers, {args.pp} ranks, {args.micro_batches} micro-batches of {seq_len} tokens, FP32, all devices on the same cores")
    runs = {}
    for name, config in SCHEDULES.items():
        steps = make_steps(args, model, config)
        rng = np.random.default_rng(0)
        shape = (args.micro_batches, 1, seq_len)
        tokens = rng.integers(0, model.vocab_size, shape).astype(np.int32)
        ones, index = np.ones(shape, np.int32), np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape)
        fields = dict(zip(NEXT_TOKEN.fields, (tokens, tokens, ones > 0, ones, index)))
        batch = {field: jax.device_put(value, steps.batch_sharding) for field, value in fields.items()}
        params = steps.plan.init(0).params
        runs[name] = lambda steps=steps, params=params, batch=batch: steps.gradient(params, batch)
        jax.block_until_ready(runs[name]())
    seconds = {name: [] for name in runs}
    for _ in range(args.repeats):  # in turn, so that all meet the same machine
        for name, run in runs.items():
            seconds[name] += seconds_of_a_step(run, 1)
    for name in runs:
        median = statistics.median(seconds[name])
        print(f"{name:24}{median * 1e3:>8.0f} ms   {median / statistics.median(seconds['1f1b']):.2f} x 1f1b")


def measure_memory(args):
    model, seq_len = dataclasses.replace(MODELS["llama-5m"], num_layers=14), 512
    hardware = dataclasses.replace(HARDWARE["h100"], value_bytes=4)  # the CPU computes in FP32
    print(f"llama-5m with {model.num_layers} layers, {args.pp} ranks, micro-batches of {seq_len} tokens, FP32, MB a device")
    print(f"{'':24}{'M':>4}{'remat':>10}{'in flight':>11}{'activations':>13}{'total predicted':>17}{'compiled':>10}{'ratio':>7}")
    for name, config in SCHEDULES.items():
        for remat in ("none", "layer") if name in ("1f1b", "zero bubble") else ("none",):
            for num_micro_batches in (8, 16, 32):
                job = Job("llama-5m", model, hardware, 1, 1, args.pp, 1, seq_len, num_micro_batches, 1, config, remat)
                predicted, compiled = memory.estimate(job), compiled_bytes(args, model, config, remat, (num_micro_batches, 1, seq_len))
                numbers = [size / 1e6 for size in (predicted["activations"], predicted["total"], compiled)]
                peak = job.table.schedule.peak_in_flight.max()
                print(
                    f"{name:24}{num_micro_batches:>4}{remat:>10}{peak:>11}{numbers[0]:>13.1f}{numbers[1]:>17.1f}{numbers[2]:>10.1f}"
                    f"{numbers[1] / numbers[2]:>7.2f}"
                )


def make_steps(args, model, config: PipelineConfig, remat: str = "none") -> Steps:
    mesh, optimizer = make_mesh(MeshConfig(pp=args.pp, dp=1)), OptimizerConfig()
    llama, layout = Llama.make(model, "blockwise", remat), Layout.make(mesh, model.num_layers, config.num_chunks)
    plan = StatePlan(llama.declared, make_optimizer(optimizer, llama.declared), layout)
    return Steps(NEXT_TOKEN, llama, layout, plan, optimizer, jnp.float32, "step", config)


def compiled_bytes(args, model, config: PipelineConfig, remat: str, shape) -> int:
    """Of the training step on each device, as XLA has laid them out."""
    steps = make_steps(args, model, config, remat)
    batch = {field: jax.ShapeDtypeStruct(shape, bool if field == "loss_mask" else np.int32) for field in NEXT_TOKEN.fields}
    state = jax.eval_shape(lambda: steps.plan.init(0))
    found = steps.train.lower(state, batch).compile().memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes


if __name__ == "__main__":
    main()
