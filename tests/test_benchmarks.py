"""Benchmarks that need a GPU run here with tiny shapes, so that they run when there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_parts_of_the_gpu_benchmark_run_without_one():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "attention", "fp8"]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "JAX_PLATFORMS": "cpu"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    *table, last = done.stdout.splitlines()
    report = json.loads(last)
    assert report["tiny"] and not report["failed"] and "no GPU, so tiny shapes" in table[0]
    names = [row["name"] for row in report["rows"]]
    assert [name for name in names if name.startswith("attention")] == [
        f"attention blockwise, {case}" for case in ("causal", "packed", "zigzag, packed", "responses")
    ]
    assert "fp8 feed-forward" in names
    assert all(row["good"] for row in report["rows"] if row["name"].startswith("attention"))


def test_a_wrong_kernel_is_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = pytest.importorskip("gpu")
    from herd_jax.models.attention import attention

    plain = attention.attention
    broken = lambda q, k, v, ranges, implementation, **options: plain(
        q, k, v, ranges if implementation == "dense" else ((ranges[0][0], ranges[0][1] - 1),), implementation, **options
    )
    monkeypatch.setattr(attention, "attention", broken)
    rows = list(gpu.attention(gpu.TINY))
    assert rows and not any(row.good for row in rows)


@pytest.mark.slow
def test_the_whole_gpu_benchmark_runs_without_one():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, env={**environment, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    names = [row["name"] for row in json.loads(done.stdout.splitlines()[-1])["rows"]]
    assert {"train llama-tiny, ours", "train memory", "decode llama-tiny, batch 1", "decode llama-tiny, batch 8", "prefill llama-tiny, 64 tokens"} <= set(names)
