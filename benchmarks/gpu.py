"""Everything of ours that needs a GPU to be believed, in one command of under ten minutes on one Hopper card, without a network:

    python benchmarks/gpu.py                    # one table, and a JSON document as the last line

1. attention: each kernel against the dense oracle in FP32, outputs and gradients, on packed documents, zigzag halves and a prompt with
   responses; and its speed.
2. train: a step of llama3.2-1b on rows of 8,192 packed tokens against transformers under torch.compile (left out where torch is missing):
   tokens/s, MFU, the seconds that `compile_for_gpu.py` estimates of the program, and memory as the planner says, as compiled and as used.
3. fp8: whether the compiled feed-forward of an 8B model multiplies in FP8 (in the HLO), and its speed on 4,096 tokens against BF16.
4. decode: tokens/s of llama3.2-1b with 1 to 256 answers at a time, and the share of the memory's bandwidth that reading the weights takes.
5. prefill: a prompt of 4,096 tokens in a model of 8B's shape, in BF16 and with an FP8 feed-forward.

Where no GPU is, the same runs with tiny shapes, to see that it runs. A part that fails says so in its place, and the exit status is 1.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer's process needs room too


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run: on a GPU, or tiny."""

    model: str
    dtype: str
    seq_len: int
    documents: int
    heads: tuple[int, int, int]  # query heads, kv heads, head dim of the attention kernels
    attention_len: int
    fp8: tuple[int, int, int]  # tokens, dim, ffn dim
    new_tokens: int
    repeats: int
    batches: tuple[int, ...]  # answers that are decoded at the same time
    prefill_model: str
    prefill_layers: int | None
    prefill_tokens: int


GPU = Sizes("llama3.2-1b", "bfloat16", 8192, 8, (32, 8, 128), 4096, (4096, 4096, 14336), 128, 10, (1, 8, 32, 128, 256), "llama3-8b", None, 4096)
TINY = Sizes("llama-tiny", "float32", 64, 2, (4, 2, 16), 64, (32, 64, 128), 8, 2, (1, 8), "llama-tiny", None, 64)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: `values` by name; `good`: whether it is what it has to be; None where it is a measurement."""

    name: str
    values: dict[str, float | str]
    good: bool | None = None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="attention, train, fp8, decode, prefill; default: all")
    args = parser.parse_args()
    parts = {"attention": attention, "train": train, "fp8": fp8, "decode": decode, "prefill": prefill}
    if unknown := set(args.parts) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: the parts are {', '.join(parts)}")
    import jax

    on_gpu = jax.default_backend() == "gpu"
    sizes, device = GPU if on_gpu else TINY, jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}" + ("" if on_gpu else ": no GPU, so tiny shapes"), flush=True)
    rows, failed = [], []
    for name in args.parts or parts:
        try:
            for row in parts[name](sizes):
                rows.append(row)
                print(line(row), flush=True)
        except Exception as error:  # the other parts are still worth running
            traceback.print_exc()
            failed.append(f"{name}: {error}")
            print(f"{name:<34} FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}", flush=True)
    failed += [f"{row.name} is not what it has to be" for row in rows if row.good is False]
    about = {"device": device.device_kind, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d"), "tiny": not on_gpu}
    print(json.dumps(about | {"rows": [dataclasses.asdict(row) for row in rows], "failed": failed}))
    sys.exit(bool(failed))


def line(row: Row) -> str:
    values = "  ".join(f"{name} {value:,.4g}" if isinstance(value, float | int) else f"{name} {value}" for name, value in row.values.items())
    return f"{row.name:<34} {'' if row.good is None else 'ok ' if row.good else 'BAD'} {values}"


def seconds_of(call: Callable, repeats: int) -> float:
    """Returns the median of `repeats` calls, after one that compiles."""
    import jax

    jax.block_until_ready(call())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def attention(sizes: Sizes) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    from herd_jax.models.attention.attention import attention as attend

    n, k, h = sizes.heads
    length, dtype = sizes.attention_len, jnp.dtype(sizes.dtype)
    on_gpu = jax.default_backend() == "gpu"
    kernels = ["blockwise", *(["tokamax"] if on_gpu and importlib.util.find_spec("tokamax") else []), *(["cudnn"] if on_gpu else [])]
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-4
    for case, (ranges, queries, causal_rows) in mask_cases(length).items():
        keys = jax.random.split(jax.random.key(0), 4)
        q = jax.random.normal(keys[0], (1, len(queries), n, h), dtype)
        kv = [jax.random.normal(key, (1, length, k, h), dtype) for key in keys[1:3]]
        weight = jax.random.normal(keys[3], q.shape, jnp.float32)

        def loss(q, k, v, implementation, ranges=ranges, causal_rows=causal_rows, weight=weight):
            o = attend(q, k, v, ranges, implementation, causal_rows=causal_rows)
            return (o.astype(jnp.float32) * weight).sum(), o

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        with jax.default_matmul_precision("highest"):
            (_, expected), expected_gradients = gradient(*(x.astype(jnp.float32) for x in (q, *kv)), "dense")
        for kernel in kernels:
            if kernel == "cudnn" and (case != "causal" or dtype != jnp.bfloat16):
                continue  # it has no other mask
            (_, found), gradients = gradient(q, *kv, kernel)
            forward, backward = error(found, expected), max(map(error, gradients, expected_gradients))
            seconds = seconds_of(functools.partial(gradient, q, *kv, kernel), sizes.repeats)
            values = {"error": forward, "gradient_error": backward, "milliseconds": 1000 * seconds}
            yield Row(f"attention {kernel}, {case}", values, bool(forward < tolerance and backward < tolerance))


def mask_cases(length: int) -> dict[str, tuple]:
    """Returns case -> (ranges, positions of the queries, whether they are rows of a causal mask)."""
    import jax.numpy as jnp

    row = np.arange(length)
    document = np.searchsorted(np.array([length // 5, length // 2, length - length // 7]), row, side="right")
    starts = np.searchsorted(document, document)
    zigzag = np.concatenate([row[: length // 4], row[-(length // 4) :]])  # what the first of two cp ranks holds
    prompt, branch = length // 2, np.maximum(length // 2, row - (row - length // 2) % (length // 8))
    pair = lambda start, end: (jnp.asarray(start, jnp.int32)[None], jnp.asarray(end, jnp.int32)[None])
    in_prompt = row < prompt
    responses = (pair(np.zeros_like(row), np.where(in_prompt, row + 1, prompt)), pair(np.where(in_prompt, 0, branch), np.where(in_prompt, 0, row + 1)))
    return {
        "causal": ((pair(np.zeros_like(row), row + 1),), row, True),
        "packed": ((pair(starts, row + 1),), row, True),
        "zigzag, packed": ((pair(starts[zigzag], zigzag + 1),), zigzag, False),
        "responses": (responses, row, False),
    }


def error(found, expected) -> float:
    """Returns the largest difference over the largest value."""
    found, expected = (np.asarray(array, np.float32) for array in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def train(sizes: Sizes) -> Iterator[Row]:
    import jax

    from herd_jax.machines.hardware import HARDWARE, peak_flops
    from herd_jax.models.config import MODELS
    from herd_jax.planning import memory
    from herd_jax.planning.job import Job

    sides = ["ours", *(["peer"] if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers") else [])]
    tokens, found = sizes.seq_len, {}
    for side in sides:
        about, taken = steps_of(side, sizes)
        found[side] = statistics.median(taken)
        values = {"tokens_per_second": tokens / found[side], "seconds": found[side]}
        peak = peak_flops(jax.devices()[0])
        if side == "ours":
            flops_per_token = about["flops_per_token"]
        if peak:
            values["mfu"] = flops_per_token * tokens / found[side] / peak
        if side == "ours" and about["estimated_seconds"]:  # from the program, as benchmarks/compile_for_gpu.py does
            values |= {"estimated_seconds": about["estimated_seconds"], "measured_over_estimated": found[side] / about["estimated_seconds"]}
        yield Row(f"train {sizes.model}, {side}", values)
        if side == "ours":
            hardware = dataclasses.replace(HARDWARE["h100"], value_bytes=2 if sizes.dtype == "bfloat16" else 4)
            predicted = memory.estimate(Job(sizes.model, MODELS[sizes.model], hardware, seq_len=sizes.seq_len))["total"]
            values = {"predicted_gb": predicted / 1e9, "compiled_gb": about["compiled_bytes"] / 1e9}
            yield Row("train memory", values | ({"used_gb": about["used_bytes"] / 1e9} if about["used_bytes"] else {}))
    if "peer" in found:
        yield Row("train ratio, ours / torch.compile", {"ratio": found["peer"] / found["ours"]})
    else:
        print("no peer: it needs torch and transformers", flush=True)


def steps_of(side: str, sizes: Sizes) -> tuple[dict, list[float]]:
    """Returns what train_step.py says of one side, and the seconds of its steps, in a process of its own."""
    sys.path.insert(0, str(Path(__file__).parent))
    from train_step import dimensions

    command = [sys.executable, str(Path(__file__).with_name("train_step.py")), "--side", side, "--model", sizes.model, "--batch", "1"]
    command += ["--seq-len", str(sizes.seq_len), "--documents", str(sizes.documents), "--dtype", sizes.dtype]
    process = subprocess.Popen([*command, "--dimensions", json.dumps(dimensions(sizes.model))], stdin=-1, stdout=-1, text=True)
    first = process.stdout.readline()
    if not first:
        raise RuntimeError(f"train_step.py --side {side} ended with status {process.wait()}: its error is above")
    taken = []
    for _ in range(sizes.repeats):
        print(1, file=process.stdin, flush=True)
        taken.append(float(process.stdout.readline()))
    process.stdin.close()
    process.wait()
    return json.loads(first), taken


def fp8(sizes: Sizes) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    from herd_jax.models.fp8 import Fp8Matrix, quantize_rowwise

    num_tokens, dim, ffn = sizes.fp8
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, num_tokens, dim), jnp.bfloat16)
    gate_up, down = (jax.random.normal(key, shape, jnp.bfloat16) * 0.02 for key, shape in zip(keys[1:], ((2 * ffn, dim), (dim, ffn))))

    def feed_forward(x, gate_up, down):
        gate, up = jnp.split(gate_up(x), 2, -1)
        return down(jax.nn.silu(gate) * up)

    plain = jax.jit(lambda x, a, b: feed_forward(x, lambda x: x @ a.T, lambda x: x @ b.T))
    quantized = jax.jit(lambda x, a, b: feed_forward(x, a.product, b.product))
    matrices = [Fp8Matrix(*quantize_rowwise(matrix), 1200.0) for matrix in (gate_up, down)]
    seconds = {name: seconds_of(call, sizes.repeats) for name, call in (
        ("bf16", functools.partial(plain, x, gate_up, down)), ("fp8", functools.partial(quantized, x, *matrices)),
    )}  # fmt: skip
    hlo = quantized.lower(x, *matrices).compile().as_text()
    num_fp8 = hlo.count('custom_call_target="__cublas$lt$matmul$f8"')
    flops = 6 * num_tokens * dim * ffn
    rates = {f"{name}_tflops": flops / taken / 1e12 for name, taken in seconds.items()}
    difference = error(quantized(x, *matrices), plain(x, gate_up, down))
    good = num_fp8 == 2 if jax.default_backend() == "gpu" else None
    yield Row("fp8 feed-forward", {"fp8_gemms": num_fp8, "ratio": seconds["bf16"] / seconds["fp8"], **rates, "difference": difference}, good)


def random_model(name: str, dtype: str, fp8: bool = False, max_layers: int | None = None):
    """Returns a model with random weights, and the bytes that a token's step reads of them."""
    import jax
    import jax.numpy as jnp

    from herd_jax.mesh import MeshConfig, make_mesh
    from herd_jax.model import Model
    from herd_jax.models.config import MODELS
    from herd_jax.models.fp8 import Fp8Config
    from herd_jax.models.llama import Llama
    from herd_jax.models.params import Layout, is_declaration
    from herd_jax.text.tokenizer import load_tokenizer

    config, dtype = MODELS[name], jnp.dtype(dtype)
    config = dataclasses.replace(config, num_layers=min(config.num_layers, max_layers or config.num_layers), fp8=Fp8Config() if fp8 else None)
    layout, llama = Layout.make(make_mesh(MeshConfig(dp=1), jax.devices()[:1]), config.num_layers), Llama.make(config, "blockwise")
    key = jax.random.key(0)
    make = lambda d: (jax.random.normal(key, layout.stored_shape(d)) * 0.02).astype(d.dtype or dtype)
    params = jax.tree.map(make, llama.declared, is_leaf=is_declaration)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - (0 if config.tie_embeddings else config.dim * config.vocab_size * dtype.itemsize)
    return Model.of(llama, layout, params, load_tokenizer("bytes"), None, dtype.type), read


def decode(sizes: Sizes) -> Iterator[Row]:
    import jax

    from herd_jax.inference.engine.requests import Request
    from herd_jax.inference.sampling import Sampling
    from herd_jax.machines.hardware import HARDWARE

    model, read = random_model(sizes.model, sizes.dtype)
    name = next((name for name in HARDWARE if name in jax.devices()[0].device_kind.lower()), None)
    engine = model.engine(max_sequences=max(sizes.batches), max_length=32 + sizes.new_tokens, max_tokens_in_cache=max(sizes.batches) * (160 + sizes.new_tokens))
    for batch in sizes.batches:

        def generate(new_tokens, batch=batch):
            requests = [Request([1] * 31 + [i % 200], Sampling(new_tokens, ignore_eos=True), salt=str(time.perf_counter_ns())) for i in range(batch)]
            return [answer.ids for answer in engine.generate(requests)]

        whole, first = (seconds_of(functools.partial(generate, number), max(2, sizes.repeats // 3)) for number in (sizes.new_tokens, 1))
        seconds = (whole - first) / (sizes.new_tokens - 1)
        values = {"tokens_per_second": batch / seconds, "gb_per_second": read / seconds / 1e9}
        if name:
            values["bandwidth_share"] = read / seconds / HARDWARE[name].memory_bandwidth
        yield Row(f"decode {sizes.model}, batch {batch}", values)


def prefill(sizes: Sizes) -> Iterator[Row]:
    from herd_jax.inference.engine.requests import Request
    from herd_jax.inference.sampling import Sampling

    taken = {}
    for kind in ("bf16", "fp8"):
        model, _ = random_model(sizes.prefill_model, sizes.dtype, kind == "fp8", sizes.prefill_layers)
        engine = model.engine(max_sequences=1, max_length=sizes.prefill_tokens + 16, chunk_tokens=sizes.prefill_tokens)
        ask = lambda: list(engine.generate([Request([1] * sizes.prefill_tokens, Sampling(1), salt=str(time.perf_counter_ns()))]))
        taken[kind] = seconds_of(ask, max(2, sizes.repeats // 3))
    values = {f"{kind}_tokens_per_second": sizes.prefill_tokens / seconds for kind, seconds in taken.items()}
    yield Row(f"prefill {sizes.prefill_model}, {sizes.prefill_tokens} tokens", values | {"ratio": taken["bf16"] / taken["fp8"]})


if __name__ == "__main__":
    main()
