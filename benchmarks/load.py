"""Claim: each process reads only its part of a model, and holds it once: in the form for scoring, or in the decoder's.

    python benchmarks/load.py                                          # llama3.2-1b in BF16 (2.5 GB) on meshes of fake devices
    python benchmarks/load.py --model MODEL --mesh 2 1 4 1 --processes 4

Prints, for the process with the most: what its devices hold, what it read of the files, and the peak of its anonymous memory less what it had
before (mapped pages of the files do not count: the kernel drops them when it wants). Each row is loaded by new processes.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CASES = [  # processes, mesh as (tp, cp, pp, dp), form
    (1, (1, 1, 1, 1), "stacked"), (1, (1, 1, 1, 1), "apart"), (1, (2, 1, 2, 2), "stacked"), (1, (4, 1, 2, 1), "apart"),
    (2, (2, 1, 2, 1), "apart"), (4, (2, 1, 4, 1), "apart"), (4, (2, 1, 1, 4), "stacked"),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: random weights in the shape of llama3.2-1b")
    parser.add_argument("--mesh", type=int, nargs=4, metavar=("TP", "CP", "PP", "DP"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load_and_watch(*args.load)), flush=True)
        return
    with tempfile.TemporaryDirectory() as directory:
        model = args.model or make_model(Path(directory) / "model")
        forms = ("stacked", "apart")
        cases = [(args.processes, tuple(args.mesh), form) for form in forms] if args.mesh else CASES
        print(f"{'processes':>9} {'tp, cp, pp, dp':>15} {'for':>8} {'held':>9} {'read':>9} {'peak':>9} {'time':>7}", flush=True)
        for num_processes, mesh, form in cases:
            each = measure(model, num_processes, mesh, form)
            most = {name: max(of[name] for of in each) for name in each[0]}
            sizes = " ".join(f"{most[name] / 1e6:>6.0f} MB" for name in ("held", "read", "peak"))
            use = {"stacked": "scoring", "apart": "decoding"}[form]
            print(f"{num_processes:>9} {', '.join(map(str, mesh)):>15} {use:>8} {sizes} {most['seconds']:>5.1f} s", flush=True)


def make_model(path: Path) -> Path:
    import ml_dtypes
    import numpy as np

    from herd_jax.interop.formats.mapping import parameters
    from herd_jax.interop.save import save
    from herd_jax.models.config import MODELS

    config, dtype = MODELS["llama3.2-1b"], np.dtype(ml_dtypes.bfloat16)
    block = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(dtype)
    save(path, "huggingface", config, lambda name, layer=None: np.resize(block, parameters(config)[name].shape), dtype)
    return path


def measure(model: str | Path, num_processes: int, mesh: tuple[int, ...], form: str) -> list[dict]:
    """Returns what each process held, read and needed at most, in bytes, and the seconds that it took."""
    with socket.create_server(("", 0)) as first:
        port = first.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HERD_COORDINATOR": f"localhost:{port}", "HERD_NUM_PROCESSES": str(num_processes)}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, __file__, "--load", str(model), json.dumps(mesh), form]
    processes = [
        subprocess.Popen(command, env={**environment, "HERD_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True) for i in range(num_processes)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def load_and_watch(model: str, mesh: str, form: str) -> dict:
    import jax

    from herd_jax.machines.place import joined
    from herd_jax.mesh import MeshConfig, request_cpu_devices

    mesh, read, peak, done = MeshConfig(*json.loads(mesh)), [0], [0], threading.Event()
    with joined({}) as num_processes:
        request_cpu_devices(mesh, num_processes)
        import herd_jax
        from herd_jax.interop.formats.safetensors import SafetensorsFiles

        of_tensor = SafetensorsFiles.read

        def counted(*arguments):
            array = of_tensor(*arguments)
            read[0] += array.nbytes
            return array

        def watch():
            while not done.wait(0.005):
                peak[0] = max(peak[0], anonymous())

        SafetensorsFiles.read = counted
        loaded = herd_jax.load(model, mesh, "bfloat16")
        before, began, watcher = anonymous(), time.perf_counter(), threading.Thread(target=watch)
        read[0] = 0  # without what a tied model's two matrices were compared with
        watcher.start()
        tree = jax.block_until_ready(getattr(loaded.weights, form)())
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return {"held": held, "read": read[0], "peak": max(peak[0], anonymous()) - before, "seconds": seconds}


def anonymous() -> int:
    """Returns the bytes of this process's memory that are no pages of files."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
