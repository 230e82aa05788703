"""Claims: blockwise attention is faster than the dense one and than torch's, and its memory is linear, so 32,768 tokens fit where dense cannot.

    python benchmarks/attention.py [--peer-python PYTHON]

Forward and backward in FP32, jitted, of one layer's attention. Memory is what XLA says it needs for temporaries (`memory_analysis`); the
long run is really run where it fits. The peer is torch's `scaled_dot_product_attention(is_causal=True)`, timed in turn.
"""

import argparse
import subprocess
import sys
import time

import numpy as np

SHAPES = ((8, 512, 8, 4, 64), (2, 2048, 8, 4, 64))  # B, S, N, K, H

PEER = """
import sys, time, torch
from torch.nn.functional import scaled_dot_product_attention
B, S, N, K, H = map(int, sys.argv[1:])
q, k, v = (torch.randn(B, n, S, H, requires_grad=True) for n in (N, K, K))
for _ in sys.stdin:
    start = time.perf_counter()
    scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).square().sum().backward()
    q.grad = k.grad = v.grad = None
    print(time.perf_counter() - start, flush=True)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    for shape in SHAPES:
        print("B {} S {} N {} K {} H {}:".format(*shape))
        runs = {f"{name}, {documents} documents": timed(name, documents, *shape) for name, documents in (("dense", 1), ("blockwise", 1), ("blockwise", 4))}
        if args.peer_python:
            process = subprocess.Popen([args.peer_python, "-c", PEER, *map(str, shape)], stdin=-1, stdout=-1, text=True)
            runs["torch sdpa"] = lambda: (print(1, file=process.stdin, flush=True), float(process.stdout.readline()))[1]
        seconds = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                seconds[name].append(run())
        for name, values in seconds.items():
            print(f"  {name}: {1e3 * np.median(values):.0f} ms (best {1e3 * min(values):.0f})")
        if args.peer_python:
            process.stdin.close()
    for name, seq_len in (("dense", 8192), ("dense", 32768), ("blockwise", 8192), ("blockwise", 32768)):
        step, arrays = build(name, 1, 1, seq_len, 8, 4, 64)
        compiled = step.lower(*arrays).compile()
        print(f"{name} at {seq_len} tokens (B 1, N 8, K 4, H 64): {compiled.memory_analysis().temp_size_in_bytes / 2**20:,.0f} MiB temporary", end="")
        if name == "blockwise":
            start = time.perf_counter()
            compiled(*arrays)[0].block_until_ready()
            print(f", {time.perf_counter() - start:.1f} s", end="")
        print()


def build(name, documents, batch, seq_len, num_heads, num_kv_heads, head_dim):
    """(jitted gradient, its arguments)"""
    import jax
    import jax.numpy as jnp

    from herd_jax.models.attention.attention import attention

    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (batch, seq_len, n, head_dim)) for key, n in zip(keys, (num_heads, num_kv_heads, num_kv_heads))]
    document = np.arange(seq_len) * documents // seq_len
    start = jnp.broadcast_to(jnp.asarray(np.searchsorted(document, document), jnp.int32), (batch, seq_len))
    end = jnp.broadcast_to(jnp.arange(1, seq_len + 1, dtype=jnp.int32), (batch, seq_len))
    loss = lambda q, k, v: jnp.square(attention(q, k, v, ((start, end),), name, causal_rows=True)).sum()
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))), arrays


def timed(name, documents, *shape):
    step, arrays = build(name, documents, *shape)
    step(*arrays)[0].block_until_ready()

    def run():
        start = time.perf_counter()
        step(*arrays)[0].block_until_ready()
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    sys.exit(main())
