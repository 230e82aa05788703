"""Meta's format both ways, in one file and in several. Runs where torch is installed: `.[peer]`."""

import dataclasses
import json
import os

import numpy as np
import pytest
import tiny
from random_models import FLOAT32, assert_same_model, random_model, read_from, save_random

import herd_jax
from herd_jax.errors import UserError
from herd_jax.interop.formats import meta
from herd_jax.interop.formats.mapping import META, parameters
from herd_jax.interop.formats.meta import ffn_dim
from herd_jax.interop.load import open_source
from herd_jax.interop.save import convert, save
from herd_jax.mesh import MeshConfig, make_mesh
from herd_jax.models.config import MODELS
from herd_jax.models.rope import RopeScaling

torch = pytest.importorskip("torch")

CONFIG = dataclasses.replace(tiny.CONFIG, dim=64, rope_scaling=RopeScaling(8.0))


def load(path):
    return torch.load(path, weights_only=True)


def cut(directory, target, num_shards):
    """Meta's files for more ranks: projections in and the vocabulary by rows, projections out by columns."""
    target.mkdir()
    tensors = load(directory / "consolidated.00.pth")
    by_columns = ("wo.weight", "w2.weight")
    for rank in range(num_shards):
        shard = {
            name: t if t.ndim == 1 else t.chunk(num_shards, dim=int(name.endswith(by_columns)))[rank].clone() for name, t in tensors.items()
        }
        torch.save({**shard, "rope.freqs": torch.zeros(2)}, target / f"consolidated.{rank:02}.pth")
    (target / "params.json").write_bytes((directory / "params.json").read_bytes())
    return target


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"ffn_dim": 37, "rope_scaling": RopeScaling(32.0)}, {"rope_scaling": None}], ids=str
)
def test_round_trip_is_identical(tmp_path, changes, dtype):
    config = dataclasses.replace(CONFIG, init_std=0.02, **changes)
    read = random_model(config, FLOAT32)
    save_random(tmp_path / "hf", config, dtype=FLOAT32)
    convert(tmp_path / "hf", tmp_path / "meta", "meta", dtype)
    convert(tmp_path / "meta", tmp_path / "again", "huggingface")
    assert_same_model(tmp_path / "meta", config, read, np.dtype(dtype))
    assert_same_model(tmp_path / "again", config, read, np.dtype(dtype))
    tensors = load(tmp_path / "meta" / "consolidated.00.pth")
    assert (tensors["output.weight"].data_ptr() == tensors["tok_embeddings.weight"].data_ptr()) == config.tie_embeddings


@pytest.mark.parametrize("num_shards", [2, 4])
def test_several_files_are_one_model(tmp_path, num_shards):
    config = dataclasses.replace(CONFIG, vocab_size=64, init_std=0.02)
    read = save_random(tmp_path / "whole", config, "meta")
    cut(tmp_path / "whole", tmp_path / "shards", num_shards)
    assert_same_model(tmp_path / "shards", config, read)
    (tmp_path / "shards" / "consolidated.00.pth").rename(tmp_path / "away")
    with pytest.raises(UserError, match="lacks consolidated.00.pth: copy that file too"):
        open_source(tmp_path / "shards")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_file_for_each_rank_is_written(tmp_path, tp, tied):
    config = dataclasses.replace(CONFIG, vocab_size=64, init_std=0.02, tie_embeddings=tied)
    read = save_random(tmp_path / "whole", config, "meta")
    convert(tmp_path / "whole", tmp_path / "shards", "meta", tp=tp)
    cut(tmp_path / "whole", tmp_path / "expected", tp)
    assert len(list((tmp_path / "shards").glob("*.pth"))) == tp
    for rank in range(tp):
        found, expected = (load(tmp_path / name / f"consolidated.{rank:02}.pth") for name in ("shards", "expected"))
        assert found.keys() == expected.keys() - {"rope.freqs"} and all(torch.equal(found[name], expected[name]) for name in found)
        assert (found["output.weight"].data_ptr() == found["tok_embeddings.weight"].data_ptr()) == tied
    assert_same_model(tmp_path / "shards", config, read)


def test_a_model_on_a_mesh_has_a_file_for_each_tp_rank(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=64, init_std=0.02)
    read = save_random(tmp_path / "herd", config, "herd", FLOAT32)
    herd_jax.load(tmp_path / "herd", make_mesh(MeshConfig(tp=2, pp=2, dp=2))).save(tmp_path / "meta", "meta")
    assert sorted(path.name for path in (tmp_path / "meta").glob("*.pth")) == ["consolidated.00.pth", "consolidated.01.pth"]
    assert_same_model(tmp_path / "meta", config, read, FLOAT32)


def test_ranks_that_cannot_share_a_model(tmp_path):
    with pytest.raises(UserError, match="for tp 2 gives each rank as many ids, and the model has 61: choose a tp that divides it"):
        save_random(tmp_path / "meta", CONFIG, "meta", tp=2)
    with pytest.raises(UserError, match="tp is 0: it must be 1 or more"):
        save_random(tmp_path / "meta", CONFIG, "meta", tp=0)
    with pytest.raises(UserError, match="for tp 3 gives each rank as many heads, and the model has 16"):
        save_random(tmp_path / "meta", CONFIG, "meta", tp=3)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_a_rank_reads_its_own_file(tmp_path, monkeypatch, num_shards):
    """Of a slice of the rows only the files that hold some of them are read."""
    config = dataclasses.replace(CONFIG, vocab_size=64, init_std=0.02)
    read = save_random(tmp_path / "meta", config, "meta", tp=num_shards)
    source, opened, whole = open_source(tmp_path / "meta"), [], meta._load
    monkeypatch.setattr(meta, "_load", lambda path: opened.append(path.name) or whole(path))
    every = slice(None)
    for name, index in {
        "ends.embed.table": (slice(48, 64), every),
        "layers.down": (slice(int(0.75 * config.ffn_dim), None), every),
        "layers.gate_up": (every, every, slice(int(0.75 * config.ffn_dim), None)),
    }.items():
        layer = 1 if name.startswith("layers") else None
        opened.clear()
        np.testing.assert_array_equal(source.read(name, layer, index), read(name, layer)[index])
        assert set(opened) == {f"consolidated.{num_shards - 1:02}.pth"}


def test_repeated_heads_are_taken_once(tmp_path):
    """As in the 405B for 16 ranks."""
    config = dataclasses.replace(CONFIG, vocab_size=64, init_std=0.02, num_kv_heads=4)
    repeated = dataclasses.replace(config, num_kv_heads=16)
    values = {name: random_model(config)(name) for name in parameters(config)}
    q, k, v = np.split(values["layers.qkv"], [4, 5], axis=3)
    q = q.reshape(*q.shape[:2], 16, 1, -1)
    twice = {**values, "layers.qkv": np.concatenate([q, np.repeat(k, 4, 2), np.repeat(v, 4, 2)], 3)}
    twice["layers.out"] = values["layers.out"].reshape(-1, 16, 1, *values["layers.out"].shape[3:])
    save(tmp_path / "whole", "meta", repeated, read_from(twice), "bfloat16")
    cut(tmp_path / "whole", tmp_path / "shards", 16)
    assert_same_model(tmp_path / "shards", config, read_from(values))


def test_pairs_are_adjacent(tmp_path):
    read = save_random(tmp_path / "meta", CONFIG, "meta", FLOAT32)
    wk = load(tmp_path / "meta" / "consolidated.00.pth")[META.key.format(layer=1)].numpy()
    key = read("layers.qkv", 1)[:, 3, -2].T  # of the fourth head, [H, D]: pairs are (0, 2) and (1, 3)
    np.testing.assert_array_equal(wk[12:16], key[[0, 2, 1, 3]])


def test_feed_forward_rule():
    """The released models (params.json)."""
    for name, multiplier, multiple in (("8b", 1.3, 1024), ("70b", 1.3, 4096), ("405b", 1.2, 4096)):
        model = MODELS[f"llama3-{name}"]
        assert ffn_dim(model.dim, multiplier, multiple) == model.ffn_dim
    assert ffn_dim(2048, 1.5, 256) == 8192 and ffn_dim(3072, 1.0, 256) == 8192


class Code:
    def __reduce__(self):
        return os.mkdir, ("/nowhere/run",)


def test_refusals(tmp_path):
    save_random(tmp_path / "meta", CONFIG, "meta")
    path = tmp_path / "meta" / "consolidated.00.pth"
    params = tmp_path / "meta" / "params.json"
    tensors, values, data = load(path), json.loads(params.read_text()), path.read_bytes()

    def refused(match):
        with pytest.raises(UserError, match=match):
            open_source(tmp_path / "meta")

    params.write_text(json.dumps({**values, "moe_args": {"num_experts": 16}}))
    refused("has moe_args: only plain Llamas")
    params.write_text(json.dumps({**values, "logit_scale": 2.0}))
    refused("has logit_scale 2.0, of which it is not known")
    params.write_text(json.dumps({**values, "dim": 128, "n_heads": 32}))
    refused(r"tok_embeddings.weight in .* is \[61, 64\] and its config asks for \[61, 128\]")
    params.write_text(json.dumps(values))
    path.write_bytes(data[: len(data) // 2])
    refused("consolidated.00.pth is truncated")
    for odd in (torch.int8, torch.float8_e4m3fn):
        torch.save({**tensors, "norm.weight": tensors["norm.weight"].to(odd)}, path)
        refused(f"norm.weight in .* is stored as {str(odd)[6:]}: only float32, float16 and bfloat16 are read")
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    refused("is in the format that torch.save had before version 1.6: load it with torch and save it again")
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, path)
    assert open_source(tmp_path / "meta").read("ends.head.norm").shape == (CONFIG.dim,)
    torch.save({**tensors, "extra": Code()}, path)
    refused("holds more than tensors, perhaps code")
    torch.save({**tensors, "layers.0.attention.wq.bias": torch.zeros(64)}, path)
    refused("has the tensor layers.0.attention.wq.bias")
    torch.save({name: t for name, t in tensors.items() if name != "norm.weight"}, path)
    refused("lacks the tensor norm.weight")
    with pytest.raises(UserError, match="head_dim = dim / num_heads"):
        save_random(tmp_path / "odd", dataclasses.replace(CONFIG, head_dim=8), "meta")
    with pytest.raises(UserError, match="scales RoPE from 8192 positions"):
        save_random(tmp_path / "odd", dataclasses.replace(CONFIG, rope_scaling=tiny.CONFIG.rope_scaling), "meta")
    assert not (tmp_path / "odd").exists() and {p.name for p in tmp_path.iterdir()} == {"meta"}
