"""Claim: tracing and compiling the training step does not take longer for more layers.

    python benchmarks/compile_time.py [--tp 1 --pp 1 --dp 1]
"""

import argparse
import dataclasses
import time

import jax
import numpy as np

from herd_jax.data.rows import DataConfig
from herd_jax.mesh import MeshConfig, make_mesh, request_cpu_devices
from herd_jax.models.config import ModelConfig
from herd_jax.training.config import RunConfig, TrainConfig, build_steps
from herd_jax.training.next_token import NEXT_TOKEN


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis in ("tp", "cp", "pp", "dp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    mesh_config = MeshConfig(args.tp, args.cp, args.pp, args.dp)
    request_cpu_devices(mesh_config)
    mesh = make_mesh(mesh_config)
    train = TrainConfig(global_batch_size=8, seq_len=256, num_micro_batches=4)
    medians = {}
    for num_layers in (8, 126):
        seconds = []
        for _ in range(args.repeats):
            jax.clear_caches()
            config = RunConfig("unused", DataConfig({"unused": 1.0}), model=ModelConfig("llama-5m", num_layers=num_layers), train=train)
            steps = build_steps(config, mesh, NEXT_TOKEN)
            state = jax.eval_shape(lambda: steps.plan.init(0))
            shape = (4, 2, 256)
            batch = {f: jax.ShapeDtypeStruct(shape, bool if f == "loss_mask" else np.int32) for f in NEXT_TOKEN.fields}
            start = time.perf_counter()
            lowered = steps.train.lower(state, batch)
            lowering = time.perf_counter() - start
            lowered.compile()
            seconds.append((lowering, time.perf_counter() - start))
        lowering, total = np.median(seconds, axis=0)
        medians[num_layers] = total
        print(f"{num_layers} layers: {total:.2f} s ({lowering:.2f} s of it tracing and lowering), jax {jax.__version__}, mesh {dataclasses.asdict(mesh_config)}")
    print(f"ratio 126 / 8 layers: {medians[126] / medians[8]:.2f}")


if __name__ == "__main__":
    main()
