"""Compiles training steps for a GPU on a machine without one, and says what the compiler made of them and what a step would take.

    python benchmarks/compile_for_gpu.py                                             # the cases of CASES, a table
    python benchmarks/compile_for_gpu.py --model llama3-8b --tp 8 --seq-len 8192     # any other: `--help`

Needs XLA's CUDA plug-in and no driver: `pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V`, V the version of the installed jax, and
tokamax (Python 3.12) for its attention. The memory, the kernels, their order and the loops are facts, of this XLA and these flags. Times are
estimates (`gpu_estimate.py` has the rates): cards are slower or faster than that, and host time, clocks and other users are not in them.

Columns: memory compiled, and of it the planner's; TFLOP in matrix products, of the model's (with attention); what rematerialisation by XLA adds to
them; kernels that only move data and take more than 1 % of the step; loops that the host drives; messages, and the share of the step that none of
the kernels hides; the step and its MFU.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from herd_jax.errors import UserError, command_line  # noqa: E402

PARTS = ("train", "fp8", "decode")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled. `part`: "train", a step; "fp8", the FP8 feed-forward of a layer alone, on one device; "decode", a token for each of
    `batch` answers, `seq_len` tokens long each, on tp. `batch`: sequences a step over all devices."""

    part: str = "train"
    model: str = "llama3.2-1b"
    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    batch: int = 1
    micro_batches: int = 1
    seq_len: int = 8192
    schedule: str = "1f1b"
    chunks: int = 1
    overlap: bool = False
    remat: str = "none"
    gather: str = "step"
    attention: str = "auto"
    layers: int = 0  # of the model's; 0: all
    hardware: str = "h100"
    xla_flags: str = ""  # added to those of herd_jax/machines/xla_flags.py


CASES = {
    "1B": Case(),
    "1B, batch 4": Case(batch=4),
    "8B tp 8": Case(model="llama3-8b", tp=8),
    "8B dp 8, gather layer": Case(model="llama3-8b", dp=8, batch=8, gather="layer"),
    "1B pp 4, 1f1b": Case(pp=4, batch=8, micro_batches=8),
    "1B pp 4, zero_bubble": Case(pp=4, batch=8, micro_batches=8, schedule="zero_bubble"),
    "8B feed-forward, FP8": Case("fp8", model="llama3-8b"),
    "8B, decode over pages": Case("decode", model="llama3-8b", batch=32),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What came out of one case. Bytes of one device; seconds of a step, by kind where that is said; TFLOP of one device and step."""

    compiled_bytes: float
    planned_bytes: float
    gemm_tflop: float
    model_tflop: float
    model_gemm_tflop: float  # of the model's, without attention
    remat_tflop: float
    fp8_gemms: int
    copies: dict[str, float]  # kernels that only move data, above 1 % of the step: seconds
    host_loops: int
    seconds: float
    kernels: dict[str, float]
    messages: dict[str, float]
    exposed: dict[str, float]
    mfu: float
    compile_seconds: float


@command_line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Case):
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=None, **kind)
    parser.add_argument("--only", help="names of cases, with ; between them")
    parser.add_argument("--hlo", type=Path, help="a folder for the compiled modules' text")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a case as JSON, in this process
    args = parser.parse_args(argv)
    if args.one:
        case, hlo = json.loads(args.one)
        print(json.dumps(dataclasses.asdict(compile_case(Case(**case), Path(hlo) if hlo else None))))
        return
    if not find_spec("jax_plugins") or not find_spec("jax_plugins.xla_cuda13"):
        jax = version("jax")
        raise UserError(f"XLA's CUDA plug-in is missing: pip install --no-deps jax-cuda13-plugin=={jax} jax-cuda13-pjrt=={jax}")
    given = {field.name: value for field in dataclasses.fields(Case) if (value := getattr(args, field.name)) is not None and value is not False}
    flags = {name: given.pop(name) for name in ("xla_flags", "hardware") if name in given}
    names = args.only.split(";") if args.only else list(CASES)
    if not set(names) <= CASES.keys():
        raise UserError(f"--only is '{args.only}': name some of {'; '.join(CASES)}")
    cases = {"this": Case(**given)} if given else {name: CASES[name] for name in names}
    if args.hlo:
        args.hlo.mkdir(parents=True, exist_ok=True)
    print(f"{'case':<24}{'GB':>7}{'planned':>9}{'TFLOP':>8}{'model':>7}{'remat':>7}{'copies':>8}{'loops':>7}{'sent ms':>9}{'exposed':>9}{'ms':>9}{'MFU':>8}")
    for name, case in cases.items():
        hlo = args.hlo / f"{name.replace(' ', '_').replace(',', '')}.hlo" if args.hlo else None
        print(row(name, facts_of(dataclasses.replace(case, **flags), hlo)), flush=True)


def facts_of(case: Case, hlo: Path | None = None) -> Facts:
    """Compiles a case in a process of its own, since XLA reads its flags once. Raises UserError for one that cannot be."""
    argument = json.dumps([dataclasses.asdict(case), str(hlo.absolute()) if hlo else None])
    done = subprocess.run([sys.executable, __file__, "--one", argument], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.rstrip().splitlines()[-1:]
        if last and last[0].startswith("error: "):
            raise UserError(last[0].removeprefix("error: "))
        raise RuntimeError(f"{case} was not compiled:\n{done.stderr}")
    return Facts(**json.loads(done.stdout.splitlines()[-1]))


def row(name: str, facts: Facts) -> str:
    exposed = sum(facts.exposed.values()) / facts.seconds
    return (
        f"{name:<24}{facts.compiled_bytes / 1e9:>7.1f}{facts.compiled_bytes / facts.planned_bytes:>9.0%}{facts.gemm_tflop:>8.1f}{facts.model_tflop:>7.1f}"
        f"{facts.remat_tflop:>7.1f}{len(facts.copies):>8}{facts.host_loops:>7}{1e3 * sum(facts.messages.values()):>9.1f}{exposed:>9.1%}"
        f"{1e3 * facts.seconds:>9.1f}{facts.mfu:>8.1%}"
    )


def compile_case(case: Case, hlo_path: Path | None) -> Facts:
    os.environ.update(JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="2", XLA_FLAGS=case.xla_flags)  # before jax is imported
    from gpu_devices import DATA_SHEETS, devices

    from herd_jax.machines.xla_flags import choose_flags, set_flags

    if case.hardware not in DATA_SHEETS or case.part not in PARTS:
        raise UserError(f"a {case.part} part on {case.hardware} is not known: --part is one of {', '.join(PARTS)}, --hardware of {', '.join(DATA_SHEETS)}")
    set_flags(choose_flags(DATA_SHEETS[case.hardware].name), os.environ)
    import jax

    from herd_jax.inference.engine.build import token_bytes, weight_bytes
    from herd_jax.machines.hardware import HARDWARE
    from herd_jax.mesh import MeshConfig
    from herd_jax.parallel.schedule import PipelineConfig
    from herd_jax.planning import memory, throughput
    from herd_jax.planning.job import Job

    sizes = MeshConfig(case.tp, case.cp, case.pp, case.dp)
    _show(found := devices(case.hardware, case.tp * case.cp * case.pp * case.dp))
    pipeline = PipelineConfig(case.schedule, case.chunks, overlap=case.overlap)
    model, lowered = {"train": _lower, "fp8": _lower_fp8, "decode": _lower_decode}[case.part](case, sizes, pipeline, found)
    start = time.perf_counter()
    compiled = lowered.compile()
    taken = time.perf_counter() - start
    text, used = compiled.as_text(), compiled.memory_analysis()
    if hlo_path:
        hlo_path.write_text(text)
    hardware = HARDWARE[case.hardware]
    job = Job(
        case.model, model, hardware, case.tp, case.cp, case.pp, case.dp, case.seq_len, case.batch // case.dp, case.batch // case.dp // case.micro_batches,
        pipeline, case.remat, case.gather,
    )  # fmt: skip
    totals, seconds = _estimate(text, hardware, case, job, speed := throughput.estimate(job))
    total = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes + used.temp_size_in_bytes
    if case.part == "fp8":
        planned, flops = total, 6 * case.seq_len * model.dim * model.ffn_dim
        gemm_flops = flops
    elif case.part == "decode":
        held = _programs(case, sizes, found)
        planned = weight_bytes(held.model, held.layout, held.dtype) + case.batch * case.seq_len * token_bytes(held.model, held.layout, held.dtype)
        flops, gemm_flops = (model.flops_per_token(keys) / 3 * case.batch / case.tp for keys in (case.seq_len, 0))  # forward is a third
    else:
        tokens = job.tokens_per_step / job.num_devices
        planned, flops, gemm_flops = memory.estimate(job)["total"], speed.flops_per_token * tokens, model.flops_per_token(keys_seen=0) * tokens
    return Facts(
        total,
        planned,
        totals.gemm_flops / 1e12,
        flops / 1e12,
        gemm_flops / 1e12,
        totals.remat_flops / 1e12,
        totals.fp8_gemms,
        {name: spent for name, spent in totals.copies.most_common() if spent > 0.01 * seconds},
        totals.host_loops,
        seconds,
        dict(totals.kernels),
        dict(totals.messages),
        dict(totals.exposed),
        flops / seconds / hardware.peak_flops,
        taken,
    )


def _show(found: list) -> None:
    """Makes JAX, and tokamax, which asks it, see the devices that are compiled for instead of this machine's CPU."""
    import jax
    from jax.extend import backend

    jax.devices = jax.local_devices = lambda *args, **options: found
    jax.default_backend = lambda: "gpu"
    backend.get_default_device = lambda: found[0]


def _lower(case: Case, sizes, pipeline, found: list):
    """Returns the model's config and its lowered training step."""
    import jax
    import numpy as np

    from herd_jax.data.rows import DataConfig
    from herd_jax.mesh import make_mesh
    from herd_jax.models.config import ModelConfig
    from herd_jax.training.config import RunConfig, TrainConfig, build_steps
    from herd_jax.training.next_token import NEXT_TOKEN

    train = TrainConfig(
        global_batch_size=case.batch, seq_len=case.seq_len, num_micro_batches=case.micro_batches, attention=case.attention, remat=case.remat,
        gather=case.gather, compute_dtype="bfloat16",
    )  # fmt: skip
    model = ModelConfig(case.model, **({"num_layers": case.layers} if case.layers else {}))
    config = RunConfig("unused", DataConfig({"unused": 1.0}), model=model, train=train, pipeline=pipeline)
    steps = build_steps(config, make_mesh(sizes, found), NEXT_TOKEN)
    state = jax.eval_shape(lambda: steps.plan.init(0))
    state = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, steps.plan.shardings)
    shape = (case.micro_batches, case.batch // case.micro_batches, case.seq_len)
    dtype = lambda field: bool if field == "loss_mask" else np.int32
    batch = {field: jax.ShapeDtypeStruct(shape, dtype(field), sharding=steps.batch_sharding) for field in NEXT_TOKEN.fields}
    return config.model.resolve(), steps.train.lower(state, batch)


def _lower_fp8(case: Case, sizes, pipeline, found: list):
    """Returns the model's config and its lowered FP8 feed-forward on `case.seq_len` tokens."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from herd_jax.mesh import make_mesh, on_mesh
    from herd_jax.models.config import ModelConfig
    from herd_jax.models.fp8 import DTYPE, Fp8Matrix
    from herd_jax.models.llama import Layer
    from herd_jax.parallel import tensor

    model, mesh, everywhere = ModelConfig(case.model).resolve(), make_mesh(sizes, found), PartitionSpec()
    shape = lambda sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, everywhere))
    matrix = lambda *sizes: Fp8Matrix(shape((*sizes,), DTYPE), shape(sizes[:-1], jnp.float32), 1200.0)

    def feed_forward(x_BTD, gate_up, down):
        return Layer.swiglu(gate_up.product(x_BTD), down, tensor.WHOLE_SEQUENCE)

    function = on_mesh(feed_forward, mesh, (everywhere,) * 3, everywhere, jnp.bfloat16)
    x_BTD = shape((1, case.seq_len, model.dim), jnp.bfloat16)
    return model, function.lower(x_BTD, matrix(2, model.ffn_dim, model.dim), matrix(model.dim, model.ffn_dim))


def _programs(case: Case, sizes, found: list):
    """Returns the programs of an engine that holds `case.batch` sequences of `case.seq_len` tokens."""
    import jax.numpy as jnp

    from herd_jax.inference.engine.build import EngineConfig, choose_pages
    from herd_jax.inference.engine.programs import Programs
    from herd_jax.mesh import make_mesh
    from herd_jax.models.config import ModelConfig
    from herd_jax.models.llama import Llama
    from herd_jax.models.params import Layout

    model, page_size = ModelConfig(case.model, **({"num_layers": case.layers} if case.layers else {})).resolve(), EngineConfig().page_size
    layout = Layout.make(make_mesh(sizes, found), model.num_layers)
    pages = choose_pages(layout)(case.batch * -(-case.seq_len // page_size) + 1, page_size)
    return Programs(Llama.make(model), layout, jnp.bfloat16, pages, None)


def _lower_decode(case: Case, sizes, pipeline, found: list):
    """Returns the model's config and the lowered forward of an engine: one token for each of `case.batch` rows."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from herd_jax.inference.engine.layout import POOL_SPEC, Pool
    from herd_jax.inference.engine.programs import EVERYWHERE
    from herd_jax.inference.engine.slots import empty
    from herd_jax.models.params import map_declarations

    programs = _programs(case, sizes, found)
    model, layout, config = programs.model, programs.layout, programs.model.config
    array = lambda shape, spec, dtype=programs.dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(layout.mesh, spec))
    apart = lambda d: [array(stored.shape, stored.spec, d.dtype or programs.dtype) for stored in layout.apart(d)]
    weights = {"ends": map_declarations(lambda d: apart(d)[0], model.declared["ends"]), "layers": map_declarations(apart, model.declared["layers"])}
    if config.tie_embeddings:
        weights["output"] = array(weights["ends"]["embed"]["table"].shape[::-1], programs.weight_specs["output"])
    shapes = programs.pages.shapes(programs.num_ranks, config.num_kv_heads, config.head_dim)
    pools = [Pool(*(array(shape, POOL_SPEC) for shape in shapes))] * programs.num_layer_slots
    slots = empty(case.batch, case.seq_len, -(-case.seq_len // programs.pages.page_size))
    slots = jax.tree.map(lambda a: array(a.shape, EVERYWHERE, a.dtype), slots)
    lowered = programs.forward(case.batch, 1, "last").lower(weights, pools, slots, None, array((case.batch,), EVERYWHERE, jnp.int32))
    return config, lowered


def _estimate(text: str, hardware, case: Case, job, speed):
    """Returns the totals of a step, and its seconds.

    A loop whose rounds a schedule's table decides runs as often as the table says, on average over ticks and ranks. What ranks wait for each other
    comes on top, as the planner has it.
    """
    from gpu_estimate import Estimate
    from hlo import Module

    from herd_jax.planning.throughput import COLUMN_OF

    mesh = {axis: getattr(case, axis) for axis in ("tp", "cp", "pp", "dp")}

    def rounds(loop) -> float:
        scope = next((part for part in reversed(loop.op_name.split("/")) if part in COLUMN_OF), None)
        if case.pp == 1 or scope is None:
            raise ValueError(f"nothing says how often the loop {loop.name} ({loop.op_name}) runs")
        return float(job.table.column(COLUMN_OF[scope]).mean())

    totals = Estimate(Module(text), hardware, mesh, rounds).totals
    idle = speed.time["bubble"] + speed.time["imbalance"]
    return totals, totals.seconds * speed.step_time_s / (speed.step_time_s - idle)


if __name__ == "__main__":
    main()
