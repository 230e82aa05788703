"""The weights of a model in their two forms, on every kind of mesh: the same after going over and back, and held once."""

import dataclasses
import gc
import shutil
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from random_models import FLOAT32, save_random

import herd_jax
from herd_jax.errors import UserError
from herd_jax.interop.load import load_params, open_source
from herd_jax.interop.operations.quantize import quantize
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.text.tokenizer import load_tokenizer

MESHES = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 4, 1), (2, 2, 2, 1), (4, 1, 1, 2), (1, 2, 1, 4), (1, 1, 8, 1)]
CONFIGS = {"untied": tiny.CONFIG, "tied": tiny.tied()}


def alike(tree, other):
    chex.assert_trees_all_equal(tree, other)
    return all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", [*CONFIGS, "fp8"])
def test_over_and_back(tmp_path, name, mesh):
    path = tmp_path / "model"
    save_random(path, CONFIGS.get(name, tiny.CONFIG), "herd", FLOAT32)
    if name == "fp8":
        quantize(path, path := tmp_path / "quantized")
    load = lambda: herd_jax.load(path, make_mesh(MeshConfig(*mesh), jax.devices()[: np.prod(mesh)]), "float32")
    model = load()
    expected = load_params(open_source(path), model.layout, model.llama.declared, jnp.float32)
    first = weakref.ref(model.params["layers"]["qkv"])
    assert alike(model.params, expected)
    assert alike(model.weights.apart(), load().weights.apart())
    assert first() is None
    second = weakref.ref(model.weights.apart()["layers"]["qkv"][0])
    assert alike(model.params, expected)
    assert second() is None


def test_the_decoder_sees_each_layer_once(tmp_path):
    """Each slot of a pipeline rank has its own array, whole over FSDP; the output of a tied model is the embedding in the order of its product."""
    read = save_random(tmp_path / "model", tiny.tied(), "herd", FLOAT32)
    weights = herd_jax.load(tmp_path / "model", make_mesh(MeshConfig(pp=2, dp=2), jax.devices()[:4])).weights.apart()
    slots = [np.asarray(array[rank]) for rank in range(2) for array in weights["layers"]["down"]]
    np.testing.assert_array_equal(np.stack([slot for slot in slots if slot.any()]), read("layers.down"))  # one slot is empty: 5 layers, 2 ranks
    np.testing.assert_array_equal(weights["output"][:, : tiny.CONFIG.vocab_size], read("ends.embed.table").T)


def test_a_model_that_is_gone_when_it_is_needed(tmp_path):
    save_random(tmp_path / "model", dataclasses.replace(tiny.CONFIG, vocab_size=261), "herd", FLOAT32, tokenizer=load_tokenizer("bytes"))
    model = herd_jax.load(tmp_path / "model")
    shutil.move(tmp_path / "model", tmp_path / "away")
    with pytest.raises(UserError, match="model can no longer be read .No such file or directory.: load the model again from where it is now"):
        model.generate(["abc"], max_new_tokens=2)
    shutil.move(tmp_path / "away", tmp_path / "model")
    assert len(model.generate(["abc"], max_new_tokens=2)) == 1


def test_weights_go_with_their_model(tmp_path):
    """No garbage collection is needed, which knows nothing of the memory of devices."""
    save_random(tmp_path / "model", tiny.CONFIG, "herd", FLOAT32)
    params = herd_jax.load(tmp_path / "model").params
    model = herd_jax.load(tmp_path / "model").with_params(jax.tree.map(jnp.copy, params))
    gc.disable()
    try:
        model.save(tmp_path / "copy")
        held = weakref.ref(model.weights.apart()["layers"]["qkv"][0])
        del model
        assert held() is None
    finally:
        gc.enable()
