"""Every attention implementation against the dense oracle, outputs and gradients; the oracle against NumPy in float64."""

import functools
import importlib.util

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from herd_jax.errors import UserError
from herd_jax.models.attention import attention as attention_module
from herd_jax.models.attention import blockwise, gpu
from herd_jax.models.attention.attention import attention, choose

HAS_TOKAMAX = importlib.util.find_spec("tokamax") is not None


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 64 whatever the shape, so that short sequences have several."""
    monkeypatch.setattr(blockwise, "MAX_SCORES", 1)


@pytest.fixture
def tokamax_on_cpu(monkeypatch):
    """Runs the same call on the XLA implementation of tokamax, which takes the same mask."""
    if not HAS_TOKAMAX:
        pytest.skip("tokamax is not installed")
    from tokamax._src.ops.attention.api import IMPLEMENTATIONS

    monkeypatch.setattr(gpu, "_flash_kernel", lambda dtype: IMPLEMENTATIONS["xla"])


def inputs(B, T, S, N, K, H, seed=0, dtype=jnp.float32):
    """Random q, k, v and cotangent of o."""
    draw = np.random.default_rng(seed).normal
    return [jnp.asarray(draw(size=size), dtype) for size in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))]


def causal(B, T):
    return np.zeros((B, T), np.int32), np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))


def documents(B, T, seed=0):
    """Ranges of a causal row in which documents of random lengths are packed."""
    begins = np.random.default_rng(seed).random((B, T)) < 0.05
    begins[:, 0] = True
    return np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1).astype(np.int32), causal(B, T)[1]


def zigzag(arrays, rank, num_ranks):
    """The queries that rank `rank` holds of each array [B, T, ...]: chunks `rank` and `2 * num_ranks - 1 - rank`."""
    chunks = [np.split(np.asarray(x), 2 * num_ranks, axis=1) for x in arrays]
    return [np.concatenate([c[rank], c[2 * num_ranks - 1 - rank]], axis=1) for c in chunks]


def some_empty(ranges, seed=0):
    """Makes a third of the queries see nothing, by start == end and by start > end."""
    start, end = (x.copy() for x in ranges)
    choice = np.random.default_rng(seed).integers(6, size=start.shape)
    end[choice == 0] = start[choice == 0]
    end[choice == 1] = 0
    return start, end


@functools.partial(jax.jit, static_argnames=("implementation", "causal_rows"))
def run(implementation, arrays, ranges, causal_rows=False):
    """Output and gradients of q, k, v; `ranges` are a pair (start, end), or several pairs."""
    *qkv, do = arrays
    ranges = ranges if isinstance(ranges[0], tuple) else (tuple(ranges),)
    o, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, ranges, implementation, causal_rows=causal_rows), *qkv)
    return o, *vjp(do)


def assert_equals_dense(implementation, arrays, ranges, tolerance=2e-5, **options):
    actual, expected = run(implementation, arrays, ranges, **options), run("dense", arrays, ranges)
    for name, x, y in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, name
        scale = max(1.0, float(jnp.abs(y).max()))
        np.testing.assert_allclose(np.float32(x) / scale, np.float32(y) / scale, atol=tolerance, rtol=0, err_msg=name)


def test_dense_equals_numpy_in_float64():
    B, T, S, N, K, H = 2, 7, 11, 6, 2, 8
    q, k, v, _ = inputs(B, T, S, N, K, H)
    generator = np.random.default_rng(1)
    start, end = generator.integers(0, S, (B, T)), generator.integers(0, S + 1, (B, T))
    expected = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        keys, values = (np.float64(x)[b, start[b, t] : end[b, t], n // (N // K)] for x in (k, v))
        if len(keys):
            weights = np.exp(keys @ np.float64(q)[b, t, n] / np.sqrt(H))
            expected[b, t, n] = weights @ values / weights.sum()
    assert (start >= end).any() and (start < end).any()
    np.testing.assert_allclose(attention(q, k, v, ((start, end),), "dense"), expected, atol=1e-6)


MASKS = {
    "causal": causal,
    "documents": documents,
    "empty": lambda B, T: some_empty(documents(B, T)),
    "bidirectional": lambda B, T: (np.zeros((B, T), np.int32), np.full((B, T), T, np.int32)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("T", [1, 37, 150])
def test_blockwise_equals_dense(mask, T):
    assert_equals_dense("blockwise", inputs(2, T, T, 4, 2, 16), MASKS[mask](2, T))


@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(
    B=st.integers(1, 3),
    T=st.integers(1, 140),
    S=st.integers(1, 140),
    K=st.integers(1, 3),
    G=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_blockwise_equals_dense_for_any_ranges(B, T, S, K, G, seed):
    ranges = np.random.default_rng(seed).integers(0, S + 1, (2, B, T)).astype(np.int32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(blockwise, "MAX_SCORES", 1)
        assert_equals_dense("blockwise", inputs(B, T, S, K * G, K, 8, seed), ranges)


def several(B, T, S, number, seed=0):
    """Ranges that do not overlap for any query; some are empty, and some queries see nothing in any."""
    edges = np.sort(np.random.default_rng(seed).integers(0, S + 1, (2 * number, B, T)), axis=0).astype(np.int32)
    edges[:, np.random.default_rng(seed + 1).random((B, T)) < 0.1] = 0
    return tuple((edges[2 * i], edges[2 * i + 1]) for i in np.random.default_rng(seed).permutation(number))


@pytest.mark.parametrize("T, S, number", [(1, 5, 2), (150, 150, 2), (70, 131, 3)])
def test_blockwise_equals_dense_over_several_ranges(T, S, number):
    assert_equals_dense("blockwise", inputs(2, T, S, 4, 2, 16), several(2, T, S, number))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ranges_of_different_rows_equal_one_row_of_all_keys(dtype):
    """The keys of one row in two arrays: the same output, and each array's part of the gradients."""
    q, k, v, do = inputs(2, 90, 150, 4, 2, 16, dtype=dtype)
    (start, middle), (start_2, end) = several(2, 90, 150, 2, seed=3)
    first, second = (np.minimum(start, 80), np.minimum(middle, 80)), (np.maximum(start_2, 80) - 80, np.maximum(end, 80) - 80)
    in_one_row = tuple((low, high) for low, high in (first, tuple(edge + 80 for edge in second)))

    def parts(q, k, v):
        return blockwise.blockwise_attention(q, ((k[:, :80], v[:, :80], *first), (k[:, 80:], v[:, 80:], *second)))

    o, vjp = jax.vjp(parts, q, k, v)
    for name, x, y in zip(("o", "dq", "dk", "dv"), (o, *vjp(do)), run("dense", [q, k, v, do], in_one_row), strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=2e-5 if dtype == jnp.float32 else 0.05, rtol=0, err_msg=name)


def test_tokamax_equals_dense_over_several_ranges(tokamax_on_cpu):
    assert_equals_dense("tokamax", inputs(2, 70, 131, 4, 2, 16), several(2, 70, 131, 2))


def test_blockwise_zigzag_parts_equal_the_whole_row():
    S, num_ranks = 222, 3
    ranges = documents(2, S)
    q, k, v, do = inputs(2, S, S, 4, 2, 16)
    o, dq, dk, dv = run("blockwise", [q, k, v, do], ranges)
    dk_parts, dv_parts = [], []
    for rank in range(num_ranks):
        q_part, do_part, o_part, dq_part = zigzag([q, do, o, dq], rank, num_ranks)
        part, part_ranges = [q_part, k, v, do_part], zigzag(ranges, rank, num_ranks)
        assert_equals_dense("blockwise", part, part_ranges)
        o_rank, dq_rank, dk_rank, dv_rank = run("blockwise", part, part_ranges)
        np.testing.assert_allclose(o_rank, o_part, atol=2e-6)
        np.testing.assert_allclose(dq_rank, dq_part, atol=2e-6)
        dk_parts.append(dk_rank), dv_parts.append(dv_rank)
    np.testing.assert_allclose(sum(dk_parts), dk, atol=1e-5)
    np.testing.assert_allclose(sum(dv_parts), dv, atol=1e-5)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_queries_that_see_nothing(implementation):
    """Output 0, gradients 0: exactly, and whatever is in the rest of the row."""
    arrays = inputs(1, 80, 80, 2, 1, 8)
    ranges = some_empty(documents(1, 80))
    empty = ranges[0] >= ranges[1]
    o, dq, _, _ = run(implementation, arrays, ranges)
    assert not o[empty].any() and not dq[empty].any() and o[~empty].all()
    nothing = np.zeros((1, 80), np.int32), np.zeros((1, 80), np.int32)
    assert all(not x.any() for x in run(implementation, arrays, nothing))


@pytest.mark.parametrize("mask", ["documents", "empty"])
def test_blockwise_in_bfloat16(mask):
    arrays = inputs(2, 150, 150, 4, 2, 16, dtype=jnp.bfloat16)
    exact = run("dense", [x.astype(jnp.float32) for x in arrays], MASKS[mask](2, 150))
    actual = run("blockwise", arrays, MASKS[mask](2, 150))
    for x, y in zip(actual, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(x), y, atol=2e-2 * float(jnp.abs(y).max()))


def test_blockwise_does_not_compute_blocks_outside_the_ranges():
    """Keys and values that are not numbers, in blocks that no query sees, reach neither output nor gradient."""
    S = 256
    arrays = inputs(2, 128, S, 2, 1, 8)
    ranges = np.full((2, 128), 70, np.int32), np.tile(71 + np.arange(128, dtype=np.int32) // 2, (2, 1))
    poisoned = [arrays[0], *(x.at[:, :64].set(jnp.nan).at[:, 192:].set(jnp.inf) for x in arrays[1:3]), arrays[3]]
    for x, y in zip(run("blockwise", poisoned, ranges), run("blockwise", arrays, ranges), strict=True):
        np.testing.assert_array_equal(x, y)
    # Each block of queries has its own limits: poison below the diagonal block of the first reaches the second only.
    o = run("blockwise", [arrays[0], *(x.at[:, 64:].set(jnp.nan) for x in arrays[1:3]), arrays[3]], causal(2, 128))[0]
    assert np.isfinite(o[:, :64]).all() and np.isnan(o[:, 64:]).all()


def test_blockwise_memory_is_linear_in_sequence_length():
    def temporary_bytes(T):
        shapes = [jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((1, T), jnp.int32)] * 2
        loss = jax.value_and_grad(lambda q, k, v, start, end: attention(q, k, v, ((start, end),), "blockwise").sum(), argnums=(0, 1, 2))
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 4.5 * temporary_bytes(2048)


def test_block_size_follows_the_shapes(monkeypatch):
    monkeypatch.undo()

    def block_size(B, T, N):
        shape = jax.ShapeDtypeStruct((B, T, N, 64), jnp.float32)
        return blockwise._block_size(shape, shape)

    assert [block_size(8, 512, 8), block_size(2, 2048, 8), block_size(1, 2048, 8)] == [64, 128, 256]
    assert block_size(64, 4096, 128) == 64 and block_size(1, 10, 1) == 16


def test_blockwise_inside_shard_map_scan_and_checkpoint():
    """As the training step uses it: layers in a scan, rematerialised, each device with its rows and heads."""
    arrays = inputs(4, 70, 70, 4, 2, 8)
    start, end = documents(4, 70)

    def layers(q, k, v, start, end):
        layer = jax.checkpoint(lambda x, _: (attention(x, k, v, ((start, end),), "blockwise"), None))
        return jax.lax.scan(layer, q, length=3)[0]

    def gradients(q, k, v, do, start, end):
        o, vjp = jax.vjp(lambda q, k, v: layers(q, k, v, start, end), q, k, v)
        return o, *vjp(do)

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("tp", "dp"))
    heads, rows = PartitionSpec("dp", None, "tp"), PartitionSpec("dp")
    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(heads, heads, heads, heads, rows, rows), out_specs=heads, check_vma=False
    )
    for x, y in zip(jax.jit(sharded)(*arrays, start, end), jax.jit(gradients)(*arrays, start, end), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_tokamax_equals_dense(mask, tokamax_on_cpu):
    assert_equals_dense("tokamax", inputs(2, 37, 37, 4, 2, 16), MASKS[mask](2, 37))


def test_tokamax_zigzag_equals_dense(tokamax_on_cpu):
    assert_equals_dense("tokamax", inputs(2, 24, 48, 4, 2, 16), zigzag(documents(2, 48), 1, 2))


@pytest.mark.parametrize("mask", ["causal", "documents", "empty"])
def test_tokamax_with_causal_rows_equals_dense(mask, tokamax_on_cpu):
    assert_equals_dense("tokamax", inputs(2, 37, 37, 4, 2, 16), MASKS[mask](2, 37), causal_rows=True)


def test_tokamax_takes_mosaic_where_it_has_a_backward_pass(monkeypatch):
    if not HAS_TOKAMAX:
        pytest.skip("tokamax is not installed")

    def kernel(capability, dtype):
        device = type("Device", (), {"compute_capability": capability})
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return type(gpu._flash_kernel(jnp.dtype(dtype))).__name__

    assert kernel("9.0", jnp.bfloat16) == kernel("10.0", jnp.bfloat16) == "PallasMosaicGpuFlashAttention"
    others = {kernel("8.0", jnp.bfloat16), kernel("12.0", jnp.bfloat16), kernel("9.0", jnp.float32)}
    assert others == {"PallasTritonFlashAttention"}


def test_cudnn_equals_dense_with_the_causal_mask(monkeypatch):
    """The same call of `jax.nn` with its XLA implementation, as cuDNN needs a GPU."""
    library = jax.nn.dot_product_attention
    asked = []

    def on_cpu(*args, implementation, **kwargs):
        asked.append(implementation)
        return library(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    assert_equals_dense("cudnn", inputs(2, 37, 37, 4, 2, 16), causal(2, 37))
    assert set(asked) == {"cudnn"}


def test_choose(monkeypatch):
    def chosen(name, platform="cpu", context_parallel=False, document_mask=True):
        return choose(name, platform=platform, context_parallel=context_parallel, document_mask=document_mask)

    def installed(is_installed):
        monkeypatch.setattr(attention_module.importlib.util, "find_spec", lambda name: object() if is_installed else None)

    installed(True)
    assert chosen("auto") == "blockwise" and chosen("auto", "gpu") == "tokamax" == chosen("tokamax", "gpu")
    assert chosen("dense") == "dense" and chosen("blockwise", "gpu") == "blockwise"
    assert chosen("cudnn", "gpu", document_mask=False) == "cudnn"
    for arguments, says in {
        ("cudnn", "gpu"): "document mask",
        ("cudnn", "gpu", True, False): "mesh.cp",
        ("cudnn", "cpu", False, False): "GPUs only",
        ("tokamax", "cpu"): "GPUs only",
        ("flash",): "auto, dense, blockwise, tokamax, cudnn",
    }.items():
        with pytest.raises(UserError, match=says):
            chosen(*arguments)
    installed(False)
    assert chosen("auto", "gpu", document_mask=False) == "cudnn" and chosen("auto") == chosen("blockwise", "gpu") == "blockwise"
    for masked in ({}, {"document_mask": False, "context_parallel": True}):
        with pytest.raises(UserError, match="no kernel for this GPU.*train.attention=blockwise"):
            chosen("auto", "gpu", **masked)
    with pytest.raises(UserError, match=r"pip install 'herd-jax\[gpu\]'"):
        chosen("tokamax", "gpu")
