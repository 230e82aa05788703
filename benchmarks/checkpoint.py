"""Claim: a checkpoint stalls training for a fraction of the time that writing it takes.

    python benchmarks/checkpoint.py                                  # 2.1 GB: FP32 parameters and the two moments of AdamW
    python benchmarks/checkpoint.py --directory DIR --local /dev/shm

Steps of a real model are timed without a save; then, a few times in turn, a save that training waits for to the end, one in the
background of the next steps, and a local one in the background. Stall: the seconds that `save` kept training (the save before, the
checksums, the copy). Cost: the stall and the time by which the steps during the writing were longer than without. Restoring includes
verifying the checksums.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from herd_jax.data.rows import DataConfig
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.models.config import ModelConfig
from herd_jax.models.params import count
from herd_jax.training.checkpoints.checkpoint import CheckpointConfig
from herd_jax.training.checkpoints.local_and_durable import TieredCheckpointer
from herd_jax.training.config import RunConfig, TrainConfig, build_steps
from herd_jax.training.next_token import NEXT_TOKEN


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-110m")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="for the durable checkpoints")
    parser.add_argument("--local", default="/dev/shm", help="for the local ones")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed without a save, in each turn")
    args = parser.parse_args()
    roots = [Path(tempfile.mkdtemp(prefix="herd-checkpoint-", dir=directory)) for directory in (args.directory, args.local)]
    try:
        measure(args, *roots)
    finally:
        for root in roots:
            shutil.rmtree(root)


def measure(args, root: Path, local: Path):
    train = TrainConfig(global_batch_size=1, seq_len=args.seq_len)
    config = RunConfig("unused", DataConfig({"unused": 1.0}), model=ModelConfig(args.model, num_layers=args.layers), train=train)
    steps = build_steps(config, make_mesh(MeshConfig(), jax.devices()[:1]), NEXT_TOKEN)
    state = steps.plan.init(0)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for directory in (root, local):
        if shutil.disk_usage(directory).free < 4 * num_bytes:
            raise SystemExit(f"error: {directory.parent} has no room for four checkpoints of {num_bytes / 1e9:.1f} GB: choose another")
    tokens = np.random.default_rng(0).integers(0, steps.model.config.vocab_size, (1, 1, args.seq_len)).astype(np.int32)
    fields = {"tokens": tokens, "targets": np.roll(tokens, -1, -1), "loss_mask": np.ones(tokens.shape, bool),
              "segment_ids": np.ones_like(tokens),
              "positions": np.broadcast_to(np.arange(args.seq_len, dtype=np.int32), tokens.shape)}  # fmt: skip
    batch = {field: jax.device_put(array, steps.batch_sharding) for field, array in fields.items()}

    def take_step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = steps.train(state, batch)
        jax.block_until_ready(metrics["loss"])
        return time.perf_counter() - start

    checkpointer = TieredCheckpointer(root, CheckpointConfig(keep=1, local_directory=str(local)))
    local_tier = local / f"{(root / '.run').read_text()}-0"
    take_step(), take_step()
    number, alone, stalls, costs = 0, [], {}, {}
    for turn in range(args.turns + 1):  # the first one compiles the checksums, and does not count
        for how, durable, waits in (("synchronous", True, True), ("asynchronous", True, False), ("asynchronous, local", False, False)):
            usual = [take_step() for _ in range(args.steps)]
            number += 1
            start = time.perf_counter()
            stall = checkpointer.save(number, steps.plan.to_canonical(state), {}, {}, durable=durable)
            if waits:
                checkpointer.wait()
                stall = cost = time.perf_counter() - start
            else:
                slowed = []
                while not ((root if durable else local_tier) / str(number)).exists():  # it has this name when it is complete
                    slowed.append(take_step())
                cost = stall + sum(slowed) - len(slowed) * statistics.median(usual)
            if turn:
                alone += usual
                stalls.setdefault(how, []).append(stall)
                costs.setdefault(how, []).append(cost)
    step_s = statistics.median(alone)
    print(f"{count(steps.model.declared):,} parameters, state {num_bytes / 1e9:.2f} GB, a step of {args.seq_len} tokens {step_s:.2f} s")
    for how in stalls:
        stall, cost = statistics.median(stalls[how]), statistics.median(costs[how])
        print(f"  {how}: stall {stall:.2f} s ({stall / step_s:.0%} of a step), cost {cost:.2f} s ({cost / step_s:.0%}); {args.turns} saves,"
              f" stalls {min(stalls[how]):.2f} to {max(stalls[how]):.2f}")  # fmt: skip
    abstract = steps.plan.abstract_canonical()
    for tier in ("local", "durable"):  # a local one is the newest
        start = time.perf_counter()
        restored = checkpointer.restore(abstract)
        jax.block_until_ready(restored.state)
        print(f"  restored from the {tier} tier and verified in {time.perf_counter() - start:.2f} s")
        del restored
        for path in local.glob("*/*"):
            shutil.rmtree(path)
    checkpointer.close()


if __name__ == "__main__":
    main()
