"""A model on the mesh of several processes: each reads only its part, and together they write what one process writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import FLOAT32, save_random
import dataclasses
import tiny
import numpy as np
import herd_jax

PROGRAM = """
import json, os, sys
from pathlib import Path
import jax, numpy as np
from herd_jax.machines.place import joined
from herd_jax.mesh import MeshConfig, request_cpu_devices

model, target, mesh = Path(sys.argv[1]), Path(sys.argv[2]), MeshConfig(*json.loads(sys.argv[3]))
with joined({}) as num_processes:
    request_cpu_devices(mesh, num_processes)
    import herd_jax
    from herd_jax.interop.formats import safetensors

    safetensors.MAX_FILE_BYTES = 20_000  # several files
    loaded = herd_jax.load(model, mesh)
    loaded.save(target / "herd")
    text = loaded.generate(["abc", "a longer prompt"], max_new_tokens=5)
    loaded.save(target / "huggingface", "huggingface")  # from the decoder's form
    print(json.dumps(text), flush=True)
"""
CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=264, init_std=0.4)


def run(program, arguments, num_processes, port):
    """Runs a program in several processes; returns their outputs."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HERD_COORDINATOR": f"localhost:{port}", "HERD_NUM_PROCESSES": str(num_processes)}
    environment.pop("XLA_FLAGS", None)
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([sys.executable, *program, *map(str, arguments)], env={**environment, "HERD_PROCESS_ID": str(i)}, stdout=pipe, stderr=pipe, text=True)
        for i in range(num_processes)
    ]
    return [(*process.communicate(timeout=300), process.returncode) for process in processes]
