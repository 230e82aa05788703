"""Hugging Face -> ours -> Hugging Face and the other way, bit for bit; parameters read straight into a mesh. No torch is needed."""

import dataclasses
import itertools
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from random_models import BFLOAT16, FLOAT32, assert_same_model, read_from, save_random

from herd_jax.errors import UserError
from herd_jax.inference.weights import Weights
from herd_jax.interop.formats import safetensors
from herd_jax.interop.formats.mapping import parameters
from herd_jax.interop.load import load_params, open_source
from herd_jax.interop.mesh_reader import MeshReader
from herd_jax.interop.save import convert, save
from herd_jax.models.rope import RopeScaling
from herd_jax.training.checkpoints.checkpoint import Checkpointer

GRID = [
    dataclasses.replace(tiny.CONFIG, num_heads=n, num_kv_heads=k, head_dim=h, ffn_dim=f, tie_embeddings=tied, rope_scaling=scaling)
    for (n, k, h, f), tied, scaling in itertools.product(
        [(6, 2, 10, 52), (4, 4, 6, 33), (3, 1, 8, 48)], [False, True], [None, RopeScaling(32.0, 1.0, 4.0, 16)]
    )
]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("config", GRID)
def test_round_trips_are_identical(tmp_path, config):
    read = save_random(tmp_path / "hf", config)
    assert_same_model(tmp_path / "hf", config, read)
    convert(tmp_path / "hf", tmp_path / "ours")
    assert_same_model(tmp_path / "ours", config, read)
    convert(tmp_path / "ours", tmp_path / "again", "huggingface")
    assert files(tmp_path / "again") == files(tmp_path / "hf")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


@pytest.mark.parametrize("mesh", [{}, {"tp": 2, "pp": 2, "dp": 2}, {"tp": 8}, {"pp": 3}, {"cp": 2, "dp": 2}], ids=str)
@pytest.mark.parametrize("to", ["herd", "huggingface"])
def test_parameters_are_read_into_any_mesh(tmp_path, to, mesh):
    steps = tiny.make_steps(**mesh)
    read = save_random(tmp_path / "model", to=to, dtype=FLOAT32)
    params = load_params(open_source(tmp_path / "model"), steps.layout, steps.model.declared, jnp.float32)
    state = steps.plan.init(0)
    jax.tree.map(lambda got, like: (got.shape, got.sharding) == (like.shape, like.sharding) or pytest.fail(), params, state.params)
    canonical = steps.plan.to_canonical(state._replace(params=params)).params
    for name, d in parameters(tiny.CONFIG).items():
        keys = name.split(".")
        leaf = canonical
        for key in keys:
            leaf = leaf[key]
        np.testing.assert_array_equal(leaf, read(name), name)
        stored = params
        for key in keys:
            stored = stored[key]
        assert np.count_nonzero(stored) == np.count_nonzero(read(name))  # empty slots and padding are zero


@pytest.mark.parametrize("mesh", [{}, {"tp": 2, "pp": 2, "dp": 2}, {"pp": 3}], ids=str)
def test_a_model_on_a_mesh_is_saved(tmp_path, mesh):
    steps = tiny.make_steps(**mesh, config=tiny.tied())
    expected = by_name(tiny.canonical_params(steps))
    read = MeshReader(Weights.of(steps.plan.init(0).params, steps.model, steps.layout, jnp.float32))
    save(tmp_path / "model", "huggingface", tiny.tied(), read, "float32")
    assert_same_model(tmp_path / "model", tiny.tied(), read_from(expected), FLOAT32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, BFLOAT16])
def test_dtypes(tmp_path, dtype):
    read = save_random(tmp_path / "hf", dtype=np.dtype(dtype))
    assert_same_model(tmp_path / "hf", tiny.CONFIG, read, np.dtype(dtype))
    convert(tmp_path / "hf", tmp_path / "cast", "huggingface", "bfloat16")
    assert_same_model(tmp_path / "cast", tiny.CONFIG, read, BFLOAT16)
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_large_models_are_cut_into_files(tmp_path, monkeypatch):
    read = save_random(tmp_path / "one")
    monkeypatch.setattr(safetensors, "MAX_FILE_BYTES", 20_000)
    convert(tmp_path / "one", tmp_path / "many", "huggingface")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and all(path.stat().st_size < 25_000 for path in shards)
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * d.size for d in parameters(tiny.CONFIG).values())
    assert_same_model(tmp_path / "many", tiny.CONFIG, read)


def test_tensors_are_those_of_transformers(tmp_path):
    """[out, in], heads in order, gate before up; the peer itself is asked where it is installed."""
    c = dataclasses.replace(tiny.CONFIG, num_heads=6, num_kv_heads=2, head_dim=10, ffn_dim=33)
    read = save_random(tmp_path / "hf", c)
    tensors = safetensors.SafetensorsFiles([tmp_path / "hf" / "model.safetensors"])
    qkv, gate_up = read("layers.qkv", 3), read("layers.gate_up", 3)  # [D, K, 3 + 2, H], [D, 2, F]
    layer = {
        "self_attn.q_proj": qkv[:, :, :3].reshape(c.dim, -1).T,
        "self_attn.k_proj": qkv[:, :, 3].reshape(c.dim, -1).T,
        "self_attn.v_proj": qkv[:, :, 4].reshape(c.dim, -1).T,
        "self_attn.o_proj": read("layers.out", 3).reshape(-1, c.dim).T,
        "mlp.gate_proj": gate_up[:, 0].T,
        "mlp.up_proj": gate_up[:, 1].T,
        "mlp.down_proj": read("layers.down", 3).T,
        "input_layernorm": read("layers.attention_norm", 3),
        "post_attention_layernorm": read("layers.ffn_norm", 3),
    }
    expected = {f"model.layers.3.{name}.weight": array for name, array in layer.items()}
    expected |= {"model.embed_tokens.weight": read("ends.embed.table"), "model.norm.weight": read("ends.head.norm")}
    expected |= {"lm_head.weight": read("ends.head.output").T}
    assert len(tensors.shapes) == 3 + 9 * c.num_layers
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors.read(name), array, name)


def test_the_files_are_those_of_the_package(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    read = save_random(tmp_path / "hf", dtype=FLOAT32)
    tensors = package.load_file(tmp_path / "hf" / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.layers.3.mlp.up_proj.weight"], read("layers.gate_up", 3)[:, 1].T)
    package.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert_same_model(tmp_path / "hf", tiny.CONFIG, read, FLOAT32)


def save_run(workdir, config, *states):
    """A run's checkpoints of `states`, as after the steps 1, 2, ..."""
    model = {"name": "llama-tiny", **{f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "fp8"}}
    model["rope_scaling"] = dataclasses.asdict(config.rope_scaling)
    checkpointer = Checkpointer(workdir / "checkpoints", keep=2)
    for step, state in enumerate(states, 1):
        checkpointer.save(step, state, {"workdir": str(workdir), "data": {"sources": {str(workdir): 1.0}}, "model": model}, {})
    checkpointer.close()


def test_the_newest_checkpoint_of_a_run_is_read(tmp_path):
    steps = tiny.make_steps(pp=2, dp=2)
    state = steps.plan.to_canonical(steps.plan.init(0))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.bytes").write_bytes(b"bytes\n")
    save_run(tmp_path, tiny.CONFIG, jax.tree.map(jnp.zeros_like, state), state)
    expected = by_name(tiny.canonical_params(steps))
    assert_same_model(tmp_path, tiny.CONFIG, read_from(expected), FLOAT32)
    params = load_params(open_source(tmp_path), steps.layout, steps.model.declared, jnp.float32)
    chex.assert_trees_all_equal(params, steps.plan.init(0).params)

    source = open_source(tmp_path)
    wrong = source.checksums[".params['layers']['qkv']"] ^ 1
    source = dataclasses.replace(source, checksums={**source.checksums, ".params['layers']['qkv']": wrong})
    with pytest.raises(UserError, match="checkpoints/2 is damaged .layers.qkv.: move it away"):
        save(tmp_path / "hf", "huggingface", source.config, source.read, "float32")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))


def test_a_layer_of_a_checkpoint_is_read_without_the_others(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, num_layers=3, dim=256, ffn_dim=1024)
    steps = tiny.make_steps(config=config)
    save_run(tmp_path, config, steps.plan.to_canonical(steps.plan.init(0)))
    assert_same_model(tmp_path, config, read_from(by_name(tiny.canonical_params(steps))), FLOAT32)
    chunk = lambda name: open_source(tmp_path)._open(name).chunk_layout.read_chunk.shape
    assert chunk("layers.down") == (1, 1024, 256) and chunk("ends.embed.table") == (61, 256)


def by_name(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_command(tmp_path):
    read = save_random(tmp_path / "hf")
    paths = ["--source", tmp_path / "hf", "--target", tmp_path / "new" / "ours"]
    command = [sys.executable, "-m", "herd_jax.convert", *paths, "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {tmp_path / 'new' / 'ours'}\n", "")
    assert_same_model(tmp_path / "new" / "ours", tiny.CONFIG, read, FLOAT32)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
