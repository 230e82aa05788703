"""The encoder against its formulas in NumPy, and what padding must not change."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from herd_jax.errors import UserError
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.models.encoder import Encoder, EncoderConfig
from herd_jax.models.params import Layout, map_declarations
from herd_jax.models.rope import frequencies

CONFIG = EncoderConfig(16, 3, 2, 24, vocab_size=29, max_tokens=32, init_std=0.5)
TEXTS = [[3, 1, 4, 1, 5, 9, 2], [6], [], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]]


def make(attention="dense", seed=0):
    encoder = Encoder.make(CONFIG, 5, attention)
    layout = Layout.make(make_mesh(MeshConfig(dp=1), jax.devices()[:1]), CONFIG.num_layers)
    key = jax.random.key(seed)
    params = map_declarations(lambda d: layout.init(d, jax.random.fold_in(key, d.size)), encoder.declared)
    return encoder, params


def padded(texts, length, filler=0):
    tokens = np.full((len(texts), length), filler, np.int32)
    for row, text in zip(tokens, texts):
        row[: len(text)] = text
    return tokens, np.asarray([len(text) for text in texts], np.int32)


def plain(params, text):
    """Logits of one text by the formulas, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * w
    gelu = lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    angle = np.arange(len(text))[:, None, None] * frequencies(CONFIG.head_dim, CONFIG.rope_theta, None)

    def turn(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = p["ends"]["table"][text]
    for i in range(CONFIG.num_layers):
        w = {name: leaf[i] for name, leaf in p["layers"].items()}
        q, k, v = np.moveaxis(np.einsum("td,dnch->tnch", norm(x, w["attention_norm"]), w["qkv"]), 2, 0)
        scores = np.einsum("tnh,snh->nts", turn(q), turn(k)) / math.sqrt(CONFIG.head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh,nhd->td", weights, v, w["out"])
        x = x + gelu(norm(x, w["ffn_norm"]) @ w["up"]) @ w["down"]
    return norm(x, p["ends"]["norm"]).mean(0) @ p["ends"]["classes"]


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
def test_logits_are_those_of_the_formulas(attention):
    encoder, params = make(attention)
    got = encoder.logits(params, *padded(TEXTS, 11))
    expected = [plain(params, text) if text else np.zeros(5) for text in TEXTS]
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_neither_padding_nor_neighbours_matter():
    encoder, params = make()
    together = encoder.logits(params, *padded(TEXTS, 32, filler=28))
    for row, text in zip(together, TEXTS):
        np.testing.assert_allclose(encoder.logits(params, *padded([text], 12))[0], row, atol=1e-5)


def test_padding_gets_no_gradient():
    encoder, params = make()
    gradient = jax.grad(lambda p: (encoder.logits(p, *padded(TEXTS, 16, filler=28)) ** 2).sum())(params)
    table = np.asarray(gradient["ends"]["table"])
    seen = sorted({token for text in TEXTS for token in text})
    assert np.abs(table[seen]).min(axis=1).max() > 0 and not table[[28, 0]].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("key, value", [("dim", 0), ("num_heads", 3), ("num_heads", 16), ("max_tokens", 0)])
def test_impossible_sizes_are_refused(key, value):
    with pytest.raises(UserError, match=f"encoder.{key} (is )?{value}|encoder.num_heads {value}"):
        dataclasses.replace(CONFIG, **{key: value})
