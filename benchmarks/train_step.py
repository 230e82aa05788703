"""Claim: our training step is at least as fast as transformers' Llama under torch.compile with fused AdamW, same shapes, same dtype.

    python benchmarks/train_step.py                                              # 2 CPU cores: llama-20m, FP32
    python benchmarks/train_step.py --model llama3.2-1b --batch 2 --seq-len 8192 --dtype bfloat16 --attention tokamax   # a GPU

Two processes, one each, are built and compiled first; then they take turns of a few steps, so that both meet the same machine, and then single
steps that strictly alternate, where each finds the caches and the memory as the other left them. Both hold FP32 weights
and optimizer state, clip by the global norm, and compute in --dtype (torch: autocast). Ours packs --documents documents a row and masks
them; the peer is given plain causal attention, which is the same work where --documents is 1. The peer's python may be another one
(--peer-python) with torch and transformers in it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-20m")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--documents", type=int, default=1, help="a row, ours only")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--turns", type=int, default=3, help="of each side")
    parser.add_argument("--steps", type=int, default=4, help="timed in a turn, after one that is not")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--dimensions", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve((ours if args.side == "ours" else peer)(args))
        return

    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    pythons = {"ours": sys.executable, "peer": args.peer_python}
    arguments = [*sys.argv[1:], "--dimensions", json.dumps(dimensions(args.model))]
    sides = {
        side: subprocess.Popen([python, __file__, "--side", side, *arguments], env=environment, stdin=-1, stdout=-1, text=True)
        for side, python in pythons.items()
    }
    about = {side: json.loads(process.stdout.readline()) for side, process in sides.items()}
    seconds, alternating = ({side: [] for side in sides} for _ in range(2))
    for _ in range(args.turns):
        for side, process in sides.items():
            taken = [timed(process) for _ in range(1 + args.steps)]
            seconds[side] += taken[1:]  # the first step of a turn finds the caches and the memory as the other side left them
    for _ in range(args.turns * args.steps):
        for side, process in sides.items():
            alternating[side].append(timed(process))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    tokens = args.batch * args.seq_len
    print(f"{args.model}, {args.batch} rows of {args.seq_len} tokens, {args.documents} documents a row (ours), {args.dtype}, on {hardware()}")
    for side in sides:
        median, best = np.median(seconds[side]), min(seconds[side])
        flops = about["ours"]["flops_per_token"] * tokens
        print(f"  {side}: {tokens / median:,.0f} tokens/s ({median:.3f} s a step, best {best:.3f}), {flops / median / 1e12:.2f} TFLOP/s; {about[side]['about']}")
    ratios = [np.median(of["peer"]) / np.median(of["ours"]) for of in (seconds, alternating)]
    print(f"  ratio ours / peer: {ratios[0]:.2f} in turns ({args.turns} of {args.steps} steps each), {ratios[1]:.2f} with strictly alternating steps")


def timed(process) -> float:
    print(1, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def serve(step):
    """A timed step for each line of stdin."""
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def hardware() -> str:
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    try:
        gpus = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        gpus = ""
    return gpus or f"{os.cpu_count()} cores of {cpu}"


def dimensions(model: str) -> dict:
    """Those of a model in our table, by transformers' names: the peer's python may have none of our packages."""
    from herd_jax.models.config import MODELS

    c = MODELS[model]
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "tie_word_embeddings": c.tie_embeddings,
    }


def ours(args):
    from herd_jax.machines.xla_flags import apply_flags

    apply_flags()
    import jax

    from herd_jax.data.rows import DataConfig
    from herd_jax.mesh import MeshConfig, make_mesh
    from herd_jax.models.config import ModelConfig
    from herd_jax.models.params import count
    from herd_jax.training.config import RunConfig, TrainConfig, build_steps
    from herd_jax.training.next_token import NEXT_TOKEN

    train = TrainConfig(
        global_batch_size=args.batch, seq_len=args.seq_len, compute_dtype=args.dtype, attention=args.attention, remat=args.remat
    )
    config = RunConfig("unused", DataConfig({"unused": 1.0}), model=ModelConfig(args.model), train=train)
    steps = build_steps(config, make_mesh(MeshConfig(), jax.devices()[:1]), NEXT_TOKEN)
    rng = np.random.default_rng(0)
    shape = (1, args.batch, args.seq_len)
    tokens = rng.integers(0, steps.model.config.vocab_size, shape).astype(np.int32)
    document = np.broadcast_to(np.arange(args.seq_len, dtype=np.int32) * args.documents // args.seq_len, shape)
    starts = np.broadcast_to(np.searchsorted(document[0, 0], document[0, 0]).astype(np.int32), shape)
    fields = {"tokens": tokens, "targets": np.roll(tokens, -1, -1), "loss_mask": np.ones(shape, bool),
              "segment_ids": document + 1, "positions": np.arange(args.seq_len, dtype=np.int32) - starts}  # fmt: skip
    batch = {field: jax.device_put(array, steps.batch_sharding) for field, array in fields.items()}
    state = steps.plan.init(0)
    start = time.perf_counter()
    compiled = steps.train.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    seconds = time.perf_counter() - start

    def step():
        nonlocal state
        state, metrics = compiled(state, batch)
        metrics["loss"].block_until_ready()

    step(), step()
    about = f"{count(steps.model.declared):,} parameters, jax {jax.__version__}, compiled in {seconds:.1f} s, {memory.temp_size_in_bytes / 2**20:,.0f} MiB temporary"
    compiled_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    used_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    sizes = {"flops_per_token": steps.model.config.flops_per_token(args.seq_len / 2), "compiled_bytes": compiled_bytes, "used_bytes": used_bytes}
    print(json.dumps({"about": about, **sizes, "estimated_seconds": estimated_seconds(compiled, jax.devices()[0])}), flush=True)
    return step


def estimated_seconds(compiled, device) -> float | None:
    """Returns what `compile_for_gpu.py` would say of this program; None where the device is none of those that it knows."""
    from gpu_estimate import Estimate
    from hlo import Module

    from herd_jax.machines.hardware import HARDWARE

    name = next((name for name in HARDWARE if name in device.device_kind.lower()), None)
    if name is None:
        return None
    return Estimate(Module(compiled.as_text()), HARDWARE[name], dict.fromkeys(("tp", "cp", "pp", "dp"), 1), lambda loop: 1.0).totals.seconds


def peer(args):
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = json.loads(args.dimensions)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=args.seq_len, use_cache=False, attn_implementation="sdpa"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, sizes["vocab_size"], (args.batch, args.seq_len), device=device)
    compiled = torch.compile(model)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    step(), step()
    count = sum(p.numel() for p in model.parameters())
    about = f"{count:,} parameters, torch {torch.__version__}, transformers {transformers.__version__}, compiled in {seconds:.1f} s"
    print(json.dumps({"about": about}), flush=True)
    return step


if __name__ == "__main__":
    main()
