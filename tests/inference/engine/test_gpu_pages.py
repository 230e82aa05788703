"""The kernel over pages, interpreted on a CPU: against the page loop, another kernel and the plain forward; and that it lowers for a GPU."""

import contextlib
import dataclasses
import functools
import types

import engines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec

from herd_jax.inference.engine import build
from herd_jax.inference.engine.gpu_pages import GpuPageLayout
from herd_jax.inference.engine.layout import PageLayout, Places, Pool

K, G = 2, 3  # kv heads, and query heads that share one
LONGEST = 160


def make(dtype, head_dim, page_size, num_tokens=1, ends=(1, 50, 150, 7, 64), num_programs=64):
    """Returns a layout, queries, keys and values before the step, places, and where keys are that rows hold. Row 3 is padding; rows are of all
    lengths, and pages in random order."""
    rng = np.random.default_rng(head_dim + page_size + num_tokens)
    N, B = -(-LONGEST // page_size), len(ends)
    P = B * N + 1
    table_BN = 1 + rng.permutation(P - 1).reshape(B, N)
    end_B = np.maximum(ends, num_tokens)
    count_B = np.where(np.arange(B) == 3, 0, num_tokens)
    places = Places(*(jnp.array(a, jnp.int32) for a in (table_BN, end_B - num_tokens, count_B)))
    held_PS = np.zeros((P, page_size), bool)
    for table_N, end, count in zip(table_BN, end_B, count_B):
        position_E = np.arange(end if count else 0)
        held_PS[table_N[position_E // page_size], position_E % page_size] = True
    normal = lambda *shape: jnp.array(rng.normal(size=shape), dtype)
    q_BTNH, pool = normal(B, num_tokens, K * G, head_dim), Pool(*(normal(P, K, page_size, head_dim) for _ in "kv"))
    return GpuPageLayout(P, page_size, num_programs, interpret=True), q_BTNH, pool, places, held_PS


def loop(layout, q_BTNH, pool, places):
    """The attention of the page loop, FP32; padding rows are left out."""
    o_BTNH = PageLayout(layout.num_pages, layout.page_size).read(q_BTNH, Pool(pool.k.swapaxes(2, 3), pool.v), places)
    return numbers(o_BTNH)[np.asarray(places.count_B) > 0]


def numbers(array):
    return np.asarray(array.astype(jnp.float32))


def tolerance(dtype):
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 1e-2}


CASES = {
    "FP32": (jnp.float32, 64, 16),
    "BF16": (jnp.bfloat16, 128, 64),
    "large pages": (jnp.bfloat16, 64, 128),
    "sizes that are no powers of two": (jnp.float32, 24, 12),
    "a part for all": (jnp.float32, 64, 16, 1, (1, 50, 150, 7, 64), 1),
    "guesses": (jnp.float32, 64, 32, 4),
    "a chunk, in tiles": (jnp.bfloat16, 64, 16, 45),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_page_loop(case):
    """Rows of all lengths, one of a single token; what no row holds is not a number, and makes no difference."""
    layout, q_BTNH, pool, places, held_PS = make(*CASES[case])
    only_held = Pool(*(jnp.where(held_PS[:, None, :, None], a, jnp.nan) for a in pool))
    o_BTNH = numbers(layout.read(q_BTNH, only_held, places))
    is_row_B = np.asarray(places.count_B) > 0
    np.testing.assert_allclose(o_BTNH[is_row_B], loop(layout, q_BTNH, pool, places), **tolerance(pool.k.dtype))
    assert (o_BTNH[~is_row_B] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_is_that_of_jax(dtype):
    theirs = pytest.importorskip("jax.experimental.pallas.ops.gpu.paged_attention")
    layout, q_BTNH, pool, places, _ = make(dtype, 64, 16, ends=(1, 50, 150, 7, 64, 160))
    pools_KPSH, options = (a.swapaxes(0, 1) for a in pool), {"pages_per_compute_block": 1, "k_splits": 2, "interpret": True}
    o_BNH = theirs.paged_attention(q_BTNH[:, 0] / 8, *pools_KPSH, places.table_BN, places.start_B + 1, **options)
    is_row_B = np.asarray(places.count_B) > 0
    np.testing.assert_allclose(numbers(layout.read(q_BTNH, pool, places))[is_row_B, 0], numbers(o_BNH)[is_row_B], **tolerance(dtype))


def test_the_queries_may_be_a_part_of_the_tokens():
    layout, q_BTNH, pool, places, _ = make(jnp.float32, 64, 16, 8)
    whole_BTNH = layout.read(q_BTNH, pool, places)
    np.testing.assert_allclose(layout.read(q_BTNH[:, 3:6], pool, places, jnp.int32(3)), whole_BTNH[:, 3:6], rtol=1e-5, atol=1e-5)


def test_kv_heads_over_devices():
    layout, q_BTNH, pool, places, _ = make(jnp.float32, 64, 16)
    heads, pages = PartitionSpec(None, None, "tp"), PartitionSpec(None, "tp")
    specs = heads, Pool(pages, pages), PartitionSpec()
    over_tp = jax.shard_map(layout.read, mesh=Mesh(np.array(jax.devices()[:2]), "tp"), in_specs=specs, out_specs=heads, check_vma=False)
    o_BTNH = numbers(jax.jit(over_tp)(q_BTNH, pool, places))
    np.testing.assert_allclose(o_BTNH[np.asarray(places.count_B) > 0], loop(layout, q_BTNH, pool, places), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows, num_tokens", [(5, 1), (5, 3), (1, 1)])
def test_tokens_are_written_where_the_page_loop_writes_them(num_rows, num_tokens):
    layout, q_BTNH, pool, places, _ = make(jnp.float32, 64, 16, num_tokens)
    places, new_BTKH = Places(*(a[:num_rows] for a in places)), q_BTNH[:num_rows, :, :K]
    written = layout.write(pool, new_BTKH, -new_BTKH, places)
    expected = PageLayout(layout.num_pages, 16).write(Pool(pool.k.swapaxes(2, 3), pool.v), new_BTKH, -new_BTKH, places)
    assert (written.k[1:] == expected.k.swapaxes(2, 3)[1:]).all() and (written.v[1:] == expected.v[1:]).all()  # whatever stands in the bin
    assert (written.k[1:] != pool.k[1:]).any()


@pytest.mark.slow
def test_answers_are_those_of_the_plain_forward(monkeypatch):
    """A whole engine on tp 2: chunks, decoding, and guesses that are verified."""
    monkeypatch.setattr(build, "choose_pages", lambda layout: functools.partial(GpuPageLayout, interpret=True))
    monkeypatch.delattr(PageLayout, "read")
    model = dataclasses.replace(tiny.CONFIG, num_layers=2)
    config = build.EngineConfig(max_sequences=4, page_size=8, chunk_tokens=32, max_tokens_in_cache=400, guesses=2, strict=True)
    engine = build.make_engine(engines.parts((2, 1, 1, 1), model), config)
    requests = engines.mixed_requests(4, seed=12)
    assert [list(answer.ids) for (answer,) in engines.run(engine, requests)] == [engines.expected(request, config=model) for request in requests]


@pytest.mark.parametrize("platform, layout", [("cpu", PageLayout), ("gpu", GpuPageLayout), ("tpu", PageLayout)])
def test_the_layout_is_that_of_the_devices(platform, layout):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
    assert build.choose_pages(types.SimpleNamespace(mesh=mesh)) is layout


@pytest.mark.parametrize("num_tokens", [1, 64])
@pytest.mark.parametrize("dtype, head_dim, page_size", [(jnp.bfloat16, 128, 64), (jnp.float32, 64, 16), (jnp.float32, 24, 12)])
def test_it_lowers_for_a_gpu(dtype, head_dim, page_size, num_tokens):
    layout, q_BTNH, pool, places, _ = make(dtype, head_dim, page_size, num_tokens)
    on_gpu = GpuPageLayout(layout.num_pages, page_size)
    with a_gpu():
        text = jax.jit(on_gpu.read).trace(q_BTNH, pool, places).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1


def a_gpu():
    """A context in which jax from 0.11 on knows what it lowers for."""
    if jax.version.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=None)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("tp",), abstract_device=device))
