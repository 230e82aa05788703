"""Claim: converting a model runs at a good part of the speed at which the disk copies its files, in memory for a few tensors.

    python benchmarks/convert.py                 # 2 layers of llama3-8b in BF16 (2.98 GB), huggingface -> herd -> huggingface, and a copy
    python benchmarks/convert.py --layers 8 --directory /a/disk --to meta

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
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--to", default="herd", help="converted to this and back")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--directory", help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        print(json.dumps(timed_conversion(*args.convert)))
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as root:
        run(args, Path(root))


def run(args, root: Path):
    from herd_jax.interop.mapping import parameters
    from herd_jax.interop.save import save
    from herd_jax.models.config import MODELS

    config = dataclasses.replace(MODELS[args.model], num_layers=args.layers)
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
