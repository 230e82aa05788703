"""Does annealing help, and averaging on top? A model of 0.8M parameters trained on the Python standard library, byte by byte, three seeds.

    python benchmarks/anneal.py

Of each seed one run is forked for its last fifth: the schedule goes on, or the rate falls linearly to 0. Checkpoints of every tenth of that
fifth are kept, and the last five averaged. All models have seen the same tokens. Held-out loss in bits per byte; some minutes on two cores.
"""

import argparse
import shutil
import statistics
import sysconfig
import tempfile
from pathlib import Path

import jax

from herd_jax.config import parse
from herd_jax.data.tokenization import tokenize_files
from herd_jax.evaluation.dataset_value import held_out_losses
from herd_jax.interop.operations.average import average
from herd_jax.training.config import RunConfig
from herd_jax.training.loop import train
from herd_jax.training.next_token import NEXT_TOKEN

NUM_STEPS, ANNEAL_STEPS, NUM_CHECKPOINTS, NUM_AVERAGED = 1000, 200, 10, 5
MODEL = {"name": "llama-tiny", "dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "ffn_dim": 352, "vocab_size": 259}


def config(directory: Path, name: str, seed: int, num_steps: int, anneal_steps: int = 0) -> RunConfig:
    """The rate is near its peak where the last fifth begins: the schedule is one of a run four times as long."""
    start, every = NUM_STEPS - ANNEAL_STEPS, ANNEAL_STEPS // NUM_CHECKPOINTS
    return parse(RunConfig, {
        "workdir": str(directory / f"{name}-{seed}"),
        "seed": seed,
        "data": {"sources": str(directory / "data")},
        "model": MODEL,
        "train": {"num_steps": num_steps, "global_batch_size": 8, "seq_len": 128},
        "optimizer": {
            "peak_learning_rate": 3e-3, "final_learning_rate": 3e-5, "warmup_steps": 50, "decay_steps": 4 * NUM_STEPS,
            "anneal_from": start, "anneal_steps": anneal_steps,
        },
        "checkpoint": {"every_steps": every if num_steps > start else start, "keep": NUM_CHECKPOINTS},
        "eval": {"every_steps": NUM_STEPS, "num_batches": 64},
        "log": {"every_steps": 50},
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        tokenize_files([f"{sysconfig.get_paths()['stdlib']}/*.py"], "bytes", directory / "data", validation_fraction=0.05, processes=1)
        rows = [bits_per_byte(directory, seed) for seed in range(args.seeds)]
    print(f"\nbits per byte, held out, after {NUM_STEPS} steps of 1,024 bytes; {jax.devices()[0].device_kind}")
    print(f"{'':34}" + "".join(f"  seed {seed}" for seed in range(args.seeds)) + "    mean  lower than un-annealed")
    for name in rows[0]:
        values = [row[name] for row in rows]
        gains = [row["un-annealed"] - row[name] for row in rows]
        gain = f"{min(gains):+.4f} to {max(gains):+.4f}" if name != "un-annealed" else ""
        print(f"{name:34}" + "".join(f"  {value:.4f}" for value in values) + f"  {statistics.mean(values):.4f}  {gain}")


def bits_per_byte(directory: Path, seed: int) -> dict[str, float]:
    run = config(directory, "begun", seed, NUM_STEPS - ANNEAL_STEPS)
    train(run, NEXT_TOKEN)
    models = {}
    for name, anneal_steps in (("un-annealed", 0), ("annealed", ANNEAL_STEPS)):
        forked = config(directory, name, seed, NUM_STEPS, anneal_steps)
        shutil.copytree(run.workdir, forked.workdir)
        train(forked, NEXT_TOKEN)
        averaged = directory / f"{name}-{seed}-averaged"
        average([forked.workdir], averaged, last=NUM_AVERAGED)
        models |= {name: forked.workdir, f"{name}, last {NUM_AVERAGED} averaged": averaged}
    losses = held_out_losses(list(models.values()), run, list(run.data.sources))
    return {name: total.bits_per_byte for name, (total,) in zip(models, (found.values() for found in losses), strict=True)}


if __name__ == "__main__":
    main()
