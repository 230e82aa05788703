"""Cross-entropy against `jax.nn.log_softmax`: values and gradients, for any chunks and tp; and the memory it does without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.models import log_probabilities
from herd_jax.models.cross_entropy import cross_entropy_sum
from herd_jax.models.log_probabilities import count_misses
from herd_jax.parallel import collectives


def sum_of_log_probabilities(x_BTD, w_DV, target_BT, mask_BT, vocab_size):
    """The same loss from the log-probabilities one by one, whose cotangents are any numbers."""
    return -jnp.where(mask_BT, log_probabilities.log_probabilities(x_BTD, w_DV, target_BT, vocab_size), 0).sum()


def value_and_gradients(tp, vocab_size, scale=1.0, loss_sum=cross_entropy_sum):
    """(x_BTD, w_DV padded to a multiple of tp, targets, mask) -> scale * loss and its gradients, x's summed over tp."""
    mesh = make_mesh(MeshConfig(tp=tp, dp=1), jax.devices()[:tp])

    def share(x_BTD, w_DV, target_BT, mask_BT):
        loss = lambda x, w: scale * loss_sum(x, w, target_BT, mask_BT, vocab_size)
        value, (dx_BTD, dw_DV) = jax.value_and_grad(loss, argnums=(0, 1))(x_BTD, w_DV)
        return value[None], collectives.all_reduce(dx_BTD, "tp"), dw_DV

    vocab = P(None, "tp")
    specs = {"in_specs": (P(), vocab, P(), P()), "out_specs": (P("tp"), P(), vocab)}
    return jax.jit(jax.shard_map(share, mesh=mesh, **specs, check_vma=False))


def plain(x_BTD, w_DV, target_BT, mask_BT, scale=1.0):
    def loss(x_BTD, w_DV):
        log_probabilities = jax.nn.log_softmax((x_BTD @ w_DV).astype(jnp.float32))
        taken = jnp.take_along_axis(log_probabilities, target_BT[..., None], -1)[..., 0]
        return scale * -jnp.where(mask_BT, taken, 0).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(x_BTD, w_DV)


def make(batch, num_tokens, dim, vocab_size, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    x_BTD = rng.normal(size=(batch, num_tokens, dim)).astype(np.float32)
    w_DV = (spread * rng.normal(size=(dim, vocab_size))).astype(np.float32)
    return x_BTD, w_DV, rng.integers(0, vocab_size, (batch, num_tokens)), rng.random((batch, num_tokens)) < 0.7


def check(tp, inputs, scale=1.0, filler=0.0):
    """Compares with the plain one; `filler` is what stands in the columns that pad the vocabulary."""
    x_BTD, w_DV, target_BT, mask_BT = inputs
    vocab_size = w_DV.shape[1]
    padded = np.pad(w_DV, ((0, 0), (0, -vocab_size % tp)), constant_values=filler)
    expected, (expected_dx, expected_dw) = plain(*inputs, scale)
    for loss_sum in (cross_entropy_sum, sum_of_log_probabilities):
        values, dx_BTD, dw_DV = value_and_gradients(tp, vocab_size, scale, loss_sum)(x_BTD, padded, target_BT, mask_BT)
        np.testing.assert_allclose(values, np.full(tp, expected), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dx_BTD, expected_dx, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dw_DV[:, :vocab_size], expected_dw, rtol=1e-4, atol=1e-5)
        assert (np.asarray(dw_DV[:, vocab_size:]) == 0).all()
    return dx_BTD


TP = pytest.mark.parametrize("tp", [1, 2, 4])


@TP
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_chunks(tp, chunk_tokens, monkeypatch):
    """21 tokens in chunks of 1, of 4 (the last is filled up), and in one; the vocabulary of 37 is padded for tp."""
    monkeypatch.setattr(log_probabilities, "CHUNK_TOKENS", chunk_tokens)
    check(tp, make(3, 7, 6, 37))


@settings(deadline=None, max_examples=8)
@given(
    tp=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 3),
    num_tokens=st.integers(1, 9),
    vocab_size=st.integers(1, 11),
    chunk_tokens=st.integers(1, 9),
)
def test_odd_sizes(tp, batch, num_tokens, vocab_size, chunk_tokens):
    """Also fewer words than tp ranks, so that whole ranks hold nothing but padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_probabilities, "CHUNK_TOKENS", chunk_tokens)
        check(tp, make(batch, num_tokens, 4, vocab_size, seed=num_tokens), scale=0.25)


@TP
def test_padding_is_never_predicted(tp, monkeypatch):
    """Padded columns with huge logits change nothing and get no gradient."""
    monkeypatch.setattr(log_probabilities, "CHUNK_TOKENS", 3)
    inputs = make(2, 5, 6, 33)
    check(tp, (np.abs(inputs[0]), *inputs[1:]), filler=1e4)


@TP
def test_fully_masked_rows_give_nothing(tp):
    x_BTD, w_DV, target_BT, mask_BT = make(2, 6, 4, 12)
    mask_BT[0] = False
    dx_BTD = check(tp, (x_BTD, w_DV, target_BT, mask_BT))
    assert (np.asarray(dx_BTD[0]) == 0).all()
    values, *gradients = value_and_gradients(tp, 12)(x_BTD, w_DV, target_BT, np.zeros_like(mask_BT))
    assert (values == 0).all()
    assert all((np.asarray(g) == 0).all() for g in gradients)


@TP
def test_large_logits(tp):
    """Logits in the hundreds overflow exp: the peak over all tp ranks is taken off first."""
    inputs = make(2, 5, 6, 32, spread=200.0)
    assert np.abs(inputs[0] @ inputs[1]).max() > 500
    x_BTD, w_DV, target_BT, mask_BT = inputs
    values, dx_BTD, dw_DV = value_and_gradients(tp, 32)(*inputs)
    expected, (expected_dx, expected_dw) = plain(*inputs)
    np.testing.assert_allclose(values, np.full(tp, expected), rtol=1e-5)
    np.testing.assert_allclose(dx_BTD, expected_dx, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(dw_DV, expected_dw, rtol=1e-4, atol=1e-4)


@TP
def test_bf16(tp):
    """Logits are FP32 even where the hidden state and the weights are BF16; gradients are BF16."""
    inputs = make(2, 40, 8, 32)
    half = [jnp.asarray(a, jnp.bfloat16) for a in inputs[:2]]
    values, dx_BTD, dw_DV = value_and_gradients(tp, 32)(*half, *inputs[2:])
    exact, (expected_dx, expected_dw) = plain(*[a.astype(jnp.float32) for a in half], *inputs[2:])
    assert values.dtype == jnp.float32 and dx_BTD.dtype == dw_DV.dtype == jnp.bfloat16
    np.testing.assert_allclose(values, np.full(tp, exact), rtol=1e-5)
    np.testing.assert_allclose(dx_BTD.astype(jnp.float32), expected_dx, atol=0.05)
    np.testing.assert_allclose(dw_DV.astype(jnp.float32), expected_dw, atol=0.05)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_logits_of_all_tokens_never_exist(with_gradient):
    """16,384 tokens of the Llama 3 vocabulary: FP32 logits would take 8.4 GB; there are a few chunks and the weights' gradient."""
    num_tokens, dim, vocab_size = 16384, 16, 128_256
    function = value_and_gradients(1, vocab_size)
    if not with_gradient:
        mesh = make_mesh(MeshConfig(dp=1), jax.devices()[:1])
        loss = lambda *inputs: cross_entropy_sum(*inputs, vocab_size)
        function = jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=(P(),) * 4, out_specs=P(), check_vma=False))
    shapes, dtypes = ((1, num_tokens, dim), (dim, vocab_size)), (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bool_)
    shapes += ((1, num_tokens),) * 2
    compiled = function.lower(*map(jax.ShapeDtypeStruct, shapes, dtypes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < num_tokens * vocab_size * 4 / 2


@TP
@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_misses_are_masked_targets_that_are_not_the_likeliest(tp, chunk_tokens, monkeypatch):
    """With half of the targets likeliest, and padded columns with huge logits."""
    monkeypatch.setattr(log_probabilities, "CHUNK_TOKENS", chunk_tokens)
    x_BTD, w_DV, target_BT, mask_BT = make(3, 7, 6, 37)
    x_BTD = np.abs(x_BTD)
    likeliest_BT = (x_BTD @ w_DV).argmax(-1)
    target_BT = np.where(np.arange(7) % 2, likeliest_BT, target_BT)
    padded = np.pad(w_DV, ((0, 0), (0, -37 % tp)), constant_values=1e4)
    mesh = make_mesh(MeshConfig(tp=tp, dp=1), jax.devices()[:tp])
    count = lambda *arrays: count_misses(*arrays, 37)[None]
    found = jax.shard_map(count, mesh=mesh, in_specs=(P(), P(None, "tp"), P(), P()), out_specs=P("tp"), check_vma=False)
    expected = (mask_BT & (target_BT != likeliest_BT)).sum()
    assert 0 < expected < mask_BT.sum()
    assert (np.asarray(jax.jit(found)(x_BTD, padded, target_BT, mask_BT)) == expected).all()
