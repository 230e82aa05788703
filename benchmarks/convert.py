"""Claim: converting a model runs at a good part of the speed at which the disk copies its files, in memory for a few tensors.

    python benchmarks/convert.py                 # 2 layers of llama3-8b in BF16 (2.98 GB), huggingface -> herd -> huggingface, and a copy
    python benchmarks/convert.py --layers 8 --directory /a/disk --to meta
    python benchmarks/convert.py --run --layers 6 --vocab-size 16000    # from a checkpoint of a training run on one device, in FP32

Each conversion is a process of its own, whose peak of resident memory is printed beside the largest tensor. Copies (read and write of 16 MB
at a time) and conversions take turns; files are flushed to the disk before the clock stops.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--run", action="store_true", help="converts the checkpoint of a training run instead, once")
    parser.add_argument("--to", default="herd", help="converted to this and back")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--directory", help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--save-run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        print(json.dumps(timed_conversion(*args.convert)))
        return
    if args.save_run:
        workdir, model, num_layers, vocab_size = args.save_run
        save_run(Path(workdir), shape_of(model, int(num_layers), int(vocab_size)))
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as root:
        (checkpoint_to_huggingface if args.run else there_and_back)(args, Path(root))


def checkpoint_to_huggingface(args, root: Path):
    shape = (args.model, str(args.layers), str(args.vocab_size or 0))
    subprocess.run([sys.executable, __file__, "--save-run", str(root / "run"), *shape], check=True)
    result = convert(root / "run", root / "there", "huggingface")
    seconds, memory = result["seconds"], result["peak"] / 1e9
    print(f"checkpoint of {args.model}, {args.layers} layers, to huggingface: {seconds:.1f} s, peak of resident memory {memory:.2f} GB")


def there_and_back(args, root: Path):
    from herd_jax.interop.formats.mapping import parameters
    from herd_jax.interop.save import save

    config = shape_of(args.model, args.layers, args.vocab_size)
    declared, rng = parameters(config), np.random.default_rng(0)

    def random(name, layer):
        return rng.integers(0, 2**15, declared[name].shape, np.uint16).view(np.dtype("bfloat16"))  # any bits: nothing is computed

    save(root / "source", "huggingface", config, random, args.dtype)
    num_bytes = sum(path.stat().st_size for path in (root / "source").iterdir())
    largest = max(int(np.prod(d.shape)) for d in declared.values()) * np.dtype(args.dtype).itemsize
    steps = {
        "copy": lambda: {"seconds": timed_copy(root / "source", root / "copy")},
        f"huggingface to {args.to}": lambda: convert(root / "source", root / "there", args.to),
        f"{args.to} to huggingface": lambda: convert(root / "there", root / "back", "huggingface"),
    }
    copy, there, back = steps
    results = {what: [] for what in steps}
    for _ in range(args.turns):
        for what in (copy, there, copy, back):  # the disk is fastest after a rest, so each has its turn before and after another
            shutil.rmtree(root / "copy", ignore_errors=True)
            results[what].append(steps[what]())
        if len(results[back]) < args.turns:
            shutil.rmtree(root / "there")
            shutil.rmtree(root / "back")
    for path in (root / "source").glob("*.safetensors"):
        assert path.read_bytes() == (root / "back" / path.name).read_bytes()
    sizes = f"{num_bytes / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB"
    print(f"{args.model}, {args.layers} layers, {args.dtype}: {sizes}; there and back is bit-identical")
    for what, runs in results.items():
        seconds = np.median([result["seconds"] for result in runs])
        memory = max(result.get("peak", 0) for result in runs) / 1e9
        idle = max(result.get("idle", 0) for result in runs) / 1e9
        rest = f", peak of resident memory {memory:.2f} GB, of which {idle:.2f} before it began" if memory else ""
        print(f"  {what:24} {num_bytes / seconds / 1e9:.2f} GB/s ({seconds:.2f} s, median of {len(runs)}){rest}")


def convert(source: Path, target: Path, to: str) -> dict:
    command = [sys.executable, __file__, "--convert", str(source), str(target), to]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def timed_conversion(source: str, target: str, to: str) -> dict:
    import jax

    from herd_jax.interop.save import convert

    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    idle, start = peak(), time.perf_counter()
    convert(source, target, to)
    os.sync()
    return {"seconds": time.perf_counter() - start, "peak": peak(), "idle": idle}


def shape_of(model: str, num_layers: int, vocab_size: int | None):
    from herd_jax.models.config import MODELS

    config = MODELS[model]
    return dataclasses.replace(config, num_layers=num_layers, vocab_size=vocab_size or config.vocab_size)


def save_run(workdir: Path, config):
    """A checkpoint of random parameters, without an optimizer's state."""
    import jax
    import jax.numpy as jnp

    from herd_jax.config import to_dict
    from herd_jax.models.llama import Llama
    from herd_jax.models.params import is_declaration
    from herd_jax.training.checkpoints.checkpoint import Checkpointer
    from herd_jax.training.state import State

    jax.config.update("jax_platforms", "cpu")
    random = lambda d: jax.random.normal(jax.random.key(0), d.canonical_shape)
    params = jax.tree.map(random, Llama.make(config).declared, is_leaf=is_declaration)
    model = {name: value for name, value in to_dict(config).items() if name != "fp8"}
    run = {"workdir": str(workdir), "data": {"sources": {str(workdir): 1.0}}, "model": {"name": "llama3-8b", **model}}
    checkpointer = Checkpointer(workdir / "checkpoints", keep=1)
    checkpointer.save(1, State(jnp.int32(1), params, ()), run, {})
    checkpointer.close()


def timed_copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 16 << 20)
    os.sync()
    return time.perf_counter() - start


def peak() -> int:
    """Of resident memory in bytes, so far; mapped files count where they are in use. (ru_maxrss begins with that of the parent process.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
