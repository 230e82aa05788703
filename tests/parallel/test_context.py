"""Context parallelism: the zigzag order by hand, gathers and their gradients, and the visible range, against numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.parallel import context

CP = pytest.mark.parametrize("cp", [1, 2, 4])


def on_ranks(cp, function, in_specs, out_specs):
    """`function` as one cp rank's share."""
    mesh = make_mesh(MeshConfig(cp=cp, dp=1), jax.devices()[:cp])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def test_zigzag_order_by_hand():
    assert context.zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert context.zigzag_order(8, 4).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    assert context.zigzag_order(6, 1).tolist() == [0, 1, 2, 3, 4, 5]


@given(cp=st.integers(1, 16), chunk=st.integers(1, 9))
def test_zigzag_shares_out_causal_work_evenly(cp, chunk):
    """A permutation, of which every rank's part has the same number of (query, key) pairs under the causal mask."""
    order = context.zigzag_order(2 * cp * chunk, cp)
    assert sorted(order) == list(range(2 * cp * chunk))
    assert len({int((part + 1).sum()) for part in np.split(order, cp)}) == 1


@CP
def test_row_index_is_the_zigzag_order(cp):
    index = on_ranks(cp, lambda: context.row_index(24 // cp), (), P("cp"))()
    assert index.dtype == jnp.int32
    np.testing.assert_array_equal(index, context.zigzag_order(24, cp))


@CP
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gather_row_undoes_the_zigzag(cp, dim):
    row = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    spec = P(*[None] * dim, "cp")
    for gather in (context.gather_row, context.gather_keys):
        whole = on_ranks(cp, lambda x, gather=gather: gather(x, dim)[None], spec, P("cp"))
        ranks = whole(np.take(row, context.zigzag_order(16, cp), dim))
        assert ranks.shape == (cp, 16, 16, 16)
        for rank in ranks:
            np.testing.assert_array_equal(rank, row)


def gathered_gradient(cp):
    """(x in zigzag order, weights [cp, ...]) -> gradient of the sum over ranks r of sum(weights[r] * gathered row)."""

    def gradient(x, weights):
        return jax.grad(lambda x: jnp.sum(context.gather_keys(x, 1) * weights[0], dtype=jnp.float32))(x)

    return on_ranks(cp, gradient, (P(None, "cp"), P("cp")), P(None, "cp"))


@CP
def test_gradient_of_gathered_keys_sums_over_ranks(cp):
    rng = np.random.default_rng(1)
    x, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 16, 3), (cp, 2, 16, 3)))
    order = context.zigzag_order(16, cp)
    np.testing.assert_allclose(gathered_gradient(cp)(x[:, order], weights), weights.sum(0)[:, order], rtol=1e-6)


def test_gradient_of_gathered_keys_is_summed_in_fp32():
    """256 + 1 is 256 in BF16: sums lose the ones unless they are made in FP32.

    A CPU makes them so anyhow, so the program is read too.
    """
    share = np.array([[256, 1, 1, 2], [1, 256, 1, 2], [1, 1, 2, 256], [2, 1, 256, 1]], np.float32)  # [place, rank]
    weights = jnp.asarray(np.tile(share.T[:, None, :, None], (1, 1, 4, 1)), jnp.bfloat16)  # [rank, 1, 16, 1]
    x = jnp.zeros((1, 16, 1), jnp.bfloat16)
    got = gathered_gradient(4)(x, weights)
    assert got.dtype == jnp.bfloat16 and (got == 260).all()
    sums = re.findall(r":(\w+)\[[^\]]*\] = reduce_scatter\[", str(jax.make_jaxpr(gathered_gradient(4))(x, weights)))
    assert sums == ["f32"]


def plain_visible_range(segment_ids):
    start = np.zeros_like(segment_ids)
    for row, starts in zip(segment_ids, start, strict=True):
        for i in range(1, len(row)):
            starts[i] = starts[i - 1] if row[i] == row[i - 1] else i
    return start, np.broadcast_to(np.arange(segment_ids.shape[1]) + 1, segment_ids.shape)


@settings(deadline=None, max_examples=15)
@given(
    cp=st.sampled_from([1, 2, 4]),
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=3, max_size=3),
)
def test_visible_range(cp, rows):
    """Documents of these lengths, cut off at the end of the row or followed by padding, which is a segment 0 of its own."""
    documents = [np.repeat(np.arange(1, len(lengths) + 1), lengths)[:16] for lengths in rows]
    segment_ids = np.stack([np.pad(row, (0, 16 - len(row))) for row in documents]).astype(np.int32)
    order = context.zigzag_order(16, cp)
    found = on_ranks(cp, lambda ids: context.visible_ranges(ids)[0], P(None, "cp"), P(None, "cp"))(segment_ids[:, order])
    for got, expected in zip(found, plain_visible_range(segment_ids), strict=True):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, expected[:, order])


def test_visible_range_of_stacked_micro_batches():
    """Leading dims are kept; a row of nothing but padding still sees itself, so no query is without a key."""
    segment_ids = np.array([[[1, 1, 2, 2]], [[0, 0, 0, 0]], [[1, 2, 0, 0]]], np.int32)
    start, end = on_ranks(1, lambda ids: context.visible_ranges(ids)[0], P(), P())(segment_ids)
    assert start.tolist() == [[[0, 0, 2, 2]], [[0, 0, 0, 0]], [[0, 1, 2, 2]]]
    assert end.tolist() == [[[1, 2, 3, 4]]] * 3


@settings(deadline=None, max_examples=15)
@given(
    cp=st.sampled_from([1, 2, 4]),
    rows=st.lists(st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=3)), min_size=1, max_size=4), min_size=2, max_size=2),
)
def test_branches_see_their_trunk_and_themselves(cp, rows):
    """Segments of a trunk and branches of these lengths: a query sees what a loop over its segment says, each key in one range alone."""
    segment_ids, branch_ids = np.zeros((2, 2, 16), np.int32)
    for row, segments in enumerate(rows):
        runs = [(number, branch, length) for number, (trunk, branches) in enumerate(segments, 1) for branch, length in enumerate([trunk, *branches])]
        ids = np.array([run[:2] for run in runs for _ in range(run[2])], np.int32)[:16].T
        segment_ids[row, : ids.shape[1]], branch_ids[row, : ids.shape[1]] = ids
    order = context.zigzag_order(16, cp)
    found = on_ranks(cp, context.visible_ranges, (P(None, "cp"), P(None, "cp")), P(None, "cp"))(segment_ids[:, order], branch_ids[:, order])
    key = np.arange(16)
    seen = [sum(((start[..., None] <= key) & (key < end[..., None])).astype(int) for start, end in np.asarray(found))]
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    trunk_or_own = (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
    expected = same_segment & trunk_or_own & (key[:, None] >= key)
    np.testing.assert_array_equal(seen[0], expected[:, order].astype(int))
