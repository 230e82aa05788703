"""Row-wise FP8 against NumPy, torch and the figures of FBGEMM's arithmetic."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from herd_jax.mesh import MeshConfig, make_mesh, on_mesh
from herd_jax.models import fp8
from herd_jax.models.fp8 import Fp8Config, Fp8Matrix, fp8_matmul, quantize_rowwise
from herd_jax.models.llama import Layer
from herd_jax.parallel import tensor

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
ALL_BF16 = np.arange(65_536, dtype=np.uint16).view(ml_dtypes.bfloat16)


def saturated(x):
    """What a saturating cast of FP32 to e4m3 gives, as bytes: the nearest of all values, of two the one with the even mantissa."""
    codes = np.arange(127, dtype=np.uint8)  # 0 .. 448
    values = codes.view(E4M3).astype(np.float64)
    with np.errstate(invalid="ignore"):
        magnitude = np.minimum(np.abs(x.astype(np.float64)), 448)
    above = np.clip(np.searchsorted(values, magnitude), 1, 126)
    low, high = magnitude - values[above - 1], values[above] - magnitude
    nearest = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above).astype(np.uint8)
    return np.where(np.isnan(x), 127, nearest).astype(np.uint8) | (np.signbit(x).astype(np.uint8) << 7)


def cast_as_quantized():
    """Bytes of every BF16 as an activation: each in a row whose bound makes the scale 1."""
    rows = jnp.stack([jnp.asarray(ALL_BF16), jnp.full(65_536, 448, jnp.bfloat16)], 1)
    values, scales = jax.jit(lambda x: fp8._quantize(x, 448.0, None))(rows)
    finite = ~np.isnan(ALL_BF16.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(scales)[finite], 1)
    return np.asarray(values)[:, 0].view(np.uint8)


def test_the_cast_of_every_bf16_saturates():
    found, expected = cast_as_quantized(), saturated(ALL_BF16.astype(np.float32))
    is_nan = np.isnan(ALL_BF16.astype(np.float32))
    np.testing.assert_array_equal(found[~is_nan], expected[~is_nan])
    np.testing.assert_array_equal(found[is_nan] & 127, 127)  # NaN of either sign


def test_the_cast_of_every_bf16_is_torchs():
    torch = pytest.importorskip("torch")
    bf16 = torch.from_numpy(ALL_BF16.view(np.int16).copy()).view(torch.bfloat16)
    expected = bf16.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    is_nan = np.isnan(ALL_BF16.astype(np.float32))
    np.testing.assert_array_equal(cast_as_quantized()[~is_nan], expected[~is_nan])
    np.testing.assert_array_equal(expected[is_nan] & 127, 127)


def decibels(signal, found):
    """The signal over the noise, the mean over rows."""
    signal, found = np.asarray(signal, np.float64), np.asarray(found, np.float64)
    return np.mean(10 * np.log10((signal**2).sum(1) / ((signal - found) ** 2).sum(1)))


def dequantized(weight):
    return np.asarray(weight[0], np.float32) * np.asarray(weight[1])[:, None]


def test_known_signal_to_noise():
    """The figures of the row-wise scheme on normal values: weights 31.55 dB, product 28.54."""
    rng = np.random.default_rng(0)
    w_FD, x_TD = rng.normal(size=(512, 1024)).astype(np.float32), rng.normal(size=(256, 1024)).astype(np.float32)
    weight = quantize_rowwise(w_FD)
    assert weight[0].dtype == E4M3 and weight[0].shape == (512, 1024) and weight[1].dtype == np.float32 and weight[1].shape == (512,)
    assert decibels(w_FD, dequantized(weight)) == pytest.approx(31.55, abs=0.02)
    assert decibels(x_TD @ w_FD.T, fp8_matmul(jnp.asarray(x_TD), weight)) == pytest.approx(28.54, abs=0.05)
    scaled = w_FD * np.exp(2 * rng.normal(size=(512, 1))).astype(np.float32)
    assert decibels(scaled, dequantized(quantize_rowwise(scaled))) == pytest.approx(31.56, abs=0.02)
    tensor_wise = dequantized(quantize_rowwise(scaled.reshape(1, -1))).reshape(scaled.shape)
    assert decibels(scaled, tensor_wise) == pytest.approx(29.57, abs=0.02)


def by_numpy(x_TD, w_FD, bound):
    """FBGEMM's formulas, products and sums in FP64."""

    def quantize(rows, bound):
        most = np.clip(np.abs(rows).max(1), np.float32(1e-12), np.float32(bound))
        return saturated(rows * (np.float32(448) / most)[:, None]).view(E4M3).astype(np.float64), most / np.float32(448)

    (x, s_x), (w, s_w) = quantize(x_TD, bound), quantize(w_FD, np.inf)
    return (x @ w.T) * s_x[:, None] * s_w


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1200.0, 3.0, np.inf]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_product_is_that_of_the_formulas(seed, bound, magnitude):
    rng = np.random.default_rng(seed)
    x_TD = (magnitude * rng.standard_t(2, (5, 16))).astype(np.float32)
    w_FD = rng.normal(size=(7, 16)).astype(np.float32)
    found = fp8_matmul(jnp.asarray(x_TD), quantize_rowwise(w_FD), None if bound == np.inf else bound)
    expected = by_numpy(x_TD, w_FD, bound)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dtype_is_that_of_the_activations(dtype):
    x_TD = jax.random.normal(jax.random.key(0), (3, 32), dtype)
    weight = quantize_rowwise(jax.random.normal(jax.random.key(1), (8, 32), dtype))
    found = fp8_matmul(x_TD, weight)
    assert found.dtype == dtype and found.shape == (3, 8)
    np.testing.assert_array_equal(found, fp8_matmul(x_TD.astype(jnp.float32), weight).astype(dtype))


def test_the_bound_changes_the_rows_beyond_it_alone():
    x_TD = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    x_TD[1, 3], x_TD[2, 5], x_TD[3, 7], x_TD[4, 9] = 1200, 1201, -5000, np.inf
    weight = quantize_rowwise(np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32))
    bounded, free = fp8_matmul(jnp.asarray(x_TD), weight), fp8_matmul(jnp.asarray(x_TD), weight, None)
    assert (np.asarray(bounded) != np.asarray(free)).any(1).tolist() == [False, False, True, True, True, False]
    clipped = fp8_matmul(jnp.clip(jnp.asarray(x_TD), -1200, 1200), weight, None)
    np.testing.assert_array_equal(bounded, clipped)  # what is beyond saturates
    w_FD = np.full((1, 64), 5000, np.float32)
    np.testing.assert_allclose(dequantized(quantize_rowwise(w_FD)), w_FD, rtol=1e-6)  # weights have no bound


def test_rows_of_zeros_and_what_is_not_finite():
    weight = quantize_rowwise(np.eye(4, dtype=np.float32))
    x_TD = np.ones((5, 4), np.float32)
    x_TD[0], x_TD[1, 2], x_TD[2, 2], x_TD[3] = 0, np.nan, np.inf, 1e-30
    bounded, free = np.asarray(fp8_matmul(jnp.asarray(x_TD), weight)), np.asarray(fp8_matmul(jnp.asarray(x_TD), weight, None))
    np.testing.assert_allclose(bounded[[0, 3, 4]], [[0] * 4, [0] * 4, [1] * 4], rtol=1e-6)
    assert np.isnan(bounded[1]).all() and np.isnan(free[1:3]).all() and np.isfinite(free[[0, 3, 4]]).all()
    np.testing.assert_allclose(bounded[2], [1, 1, 1200, 1], rtol=0.1)  # infinity saturates at the bound
    values, scales = quantize_rowwise(np.array([[0.0, 0.0], [1.0, np.nan], [np.inf, 1.0]], np.float32))
    assert not np.asarray(values[0], np.float32).any() and np.isnan(scales[1]) and not np.isfinite(scales[2])


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_is_one_device(tp):
    """The hidden dim is sharded in the second product: without the maximum over tp its rows would have other scales on each device."""
    rng, (D, F) = np.random.default_rng(0), (32, 16)
    x_BTD = rng.normal(size=(2, 3, D)).astype(np.float32)
    gate_up, gate_up_scales = quantize_rowwise(rng.normal(size=(2 * F, D)).astype(np.float32))
    down, down_scales = quantize_rowwise(rng.normal(size=(D, F)).astype(np.float32))
    arguments = x_BTD, gate_up.reshape(2, F, D), gate_up_scales.reshape(2, F), down, down_scales

    def run(tp):
        mesh = make_mesh(MeshConfig(tp=tp), jax.devices()[:tp])

        def function(x_BTD, gate_up, gate_up_scales, down, down_scales):
            gate_up = Fp8Matrix(gate_up, gate_up_scales, 1200.0).product(x_BTD)
            return Layer.swiglu(gate_up, Fp8Matrix(down, down_scales, 1200.0, "tp"), tensor.WHOLE_SEQUENCE)

        specs = (PartitionSpec(), PartitionSpec(None, "tp"), PartitionSpec(None, "tp"), PartitionSpec(None, "tp"), PartitionSpec())
        return np.asarray(on_mesh(function, mesh, specs, PartitionSpec(), jnp.float32)(*arguments))

    np.testing.assert_allclose(run(tp), run(1), rtol=1e-5, atol=1e-4)


def test_which_layers():
    assert Fp8Config().layers(5) == (1, 2, 3) and Fp8Config(skip_ends=False).layers(3) == (0, 1, 2)
    assert Fp8Config().layers(126) == tuple(range(1, 125))


ON_HOPPER = """
import jax, jax.numpy as jnp
from herd_jax.models.fp8 import fp8_matmul, quantize_rowwise
device = jax.devices()[0]
if device.platform != "gpu" or not str(getattr(device, "compute_capability", "")).startswith("9."):
    print("no Hopper")
    raise SystemExit
x = jax.random.normal(jax.random.key(0), (4096, 4096), jnp.bfloat16)
weight = quantize_rowwise(jax.random.normal(jax.random.key(1), (28672, 4096), jnp.bfloat16))
print(jax.jit(fp8_matmul).lower(x, weight).compile().as_text())
"""


def test_on_hopper_the_product_is_an_fp8_gemm():
    if not pathlib.Path("/proc/driver/nvidia/version").exists():
        pytest.skip("no NVIDIA GPU")
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", ON_HOPPER], capture_output=True, text=True, env=environment, check=True)
    if "no Hopper" in done.stdout:
        pytest.skip("no Hopper GPU, or a jax without CUDA")
    by_cublas = "__cublas$lt$matmul$f8" in done.stdout
    by_triton = any("__triton" in line and "f8e4m3fn" in line for line in done.stdout.splitlines())
    assert by_cublas or by_triton, done.stdout
