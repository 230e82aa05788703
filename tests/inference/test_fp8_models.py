"""Models with an FP8 feed-forward: scoring and decoding against a plain forward with FBGEMM's formulas, on every kind of mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_dtypes import float8_e4m3fn

from herd_jax.inference.scoring.continuations import ContinuationScorer
from herd_jax.inference.engine.requests import Request
from herd_jax.inference.sampling import Sampling
from herd_jax.inference.weights import Weights
from herd_jax.interop.load import open_source
from herd_jax.interop.mesh_reader import MeshReader
from herd_jax.interop.operations.quantize import QuantizedSource
from herd_jax.interop.save import save
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.model import load_source
from herd_jax.models.fp8 import Fp8Config

MESHES = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 2), (1, 1, 2, 1), (2, 1, 4, 1)]
IDS = np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def steps():
    return tiny.make_steps()


@pytest.fixture(scope="module")
def saved(steps, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "plain"
    read = MeshReader(Weights.of(steps.plan.init(0).params, steps.model, steps.layout, jnp.float32))
    save(path, "herd", tiny.CONFIG, read, np.float32, context_length=64)
    return path


def quantized(saved, mesh=(1, 1, 1, 1), fp8=Fp8Config()):
    devices = jax.devices()[: math.prod(mesh)]
    return load_source(QuantizedSource.make(open_source(saved), fp8), make_mesh(MeshConfig(*mesh), devices))


def expected_logits(steps, fp8=Fp8Config()):
    """Weights and activations rounded row by row, then multiplied as FP32."""

    def rounded(rows, bound):
        scale = np.clip(np.abs(rows).max(-1, keepdims=True), 1e-12, bound) / 448
        return np.clip(rows / scale, -448, 448).astype(float8_e4m3fn).astype(np.float32) * scale

    def feed_forward(x, w, layer):
        if layer not in fp8.layers(tiny.CONFIG.num_layers):
            return tiny.plain_feed_forward(x, w, layer)
        bound = fp8.activation_bound or np.inf
        product = lambda x, w_DF: rounded(np.asarray(x), bound) @ rounded(w_DF.T, np.inf).T
        gate, up = (product(x, w["gate_up"][:, half]) for half in (0, 1))
        return product(jax.nn.silu(gate) * up, w["down"])

    rows = {"tokens": IDS, "segment_ids": np.ones_like(IDS), "positions": np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape)}
    return np.asarray(tiny.plain_logits(tiny.canonical_params(steps), rows, feed_forward=feed_forward))


def assert_alike(found, expected):
    """A last bit of FP32 now and then rounds an activation to the next FP8 value, which shows in few places."""
    apart = np.abs(np.asarray(found) - expected)
    assert np.median(apart) < 1e-5 and apart.max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("fp8", [Fp8Config(), Fp8Config(skip_ends=False), Fp8Config(activation_bound=1.5)], ids=str)
def test_logits_are_those_of_the_formulas(steps, saved, fp8):
    found = quantized(saved, fp8=fp8).logits(IDS)
    assert_alike(found, expected_logits(steps, fp8))
    for other in {None, *(Fp8Config(), Fp8Config(skip_ends=False), Fp8Config(activation_bound=1.5))} - {fp8}:
        wrong = expected_logits(steps, other) if other else load_source(open_source(saved)).logits(IDS)
        assert np.median(np.abs(found - wrong)) > 1e-3


@pytest.mark.parametrize("mesh", [pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[:2] + MESHES[3:4]] + [MESHES[2], MESHES[4]])
def test_scoring_and_decoding_on_any_mesh(steps, saved, mesh):
    model, expected = quantized(saved, mesh), expected_logits(steps)
    assert_alike(model.logits(IDS), expected)
    engine = model.engine(max_sequences=2, page_size=8, chunk_tokens=16, strict=True)
    for answer in engine.generate([Request(row[:20].tolist(), Sampling(4, log_probs=0), scores_prompt=True) for row in IDS]):
        whole = [*answer.request.prompt, *answer.ids]
        found = [one.raw for one in (*answer.prompt_log_probs, *answer.log_probs)]
        assert_alike(np.array(found), np.asarray(jax.nn.log_softmax(model.logits([whole])[0]))[range(23), whole[1:]])
    assert model.weights.apart()["layers"]["down_fp8"][0].dtype == float8_e4m3fn


@pytest.mark.parametrize("mesh", MESHES[:4])
def test_continuations_on_any_mesh(steps, saved, mesh):
    model = quantized(saved, mesh)
    log_p = np.asarray(jax.nn.log_softmax(expected_logits(steps)))
    requests = [(row[:first].tolist(), row[first:last].tolist()) for row in IDS for first, last in ((4, 9), (20, 24), (1, 3))]
    expected = [log_p[i // 3, range(first - 1, last - 1), IDS[i // 3, first:last]].sum() for i, (first, last) in enumerate([(4, 9), (20, 24), (1, 3)] * 2)]
    found = dict(ContinuationScorer(model.llama, model.layout, model.dtype).score(model.params, requests))
    np.testing.assert_allclose([found[i].log_likelihood for i in range(6)], expected, atol=0.3)
    assert np.median([abs(found[i].log_likelihood - expected[i]) for i in range(6)]) < 1e-4


def test_memory_is_a_byte_a_weight(saved):
    params = quantized(saved).params["layers"]
    assert params["gate_up_fp8"].shape == (3, 2, 48, 32) and params["gate_up_fp8"].nbytes == 3 * 2 * 48 * 32
    assert params["gate_up"].shape[0] == 2
