"""What cannot be read or written is refused in one sentence, and nothing half-made stays."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from random_models import random_model, save_random

from herd_jax.errors import UserError
from herd_jax.interop.formats import safetensors
from herd_jax.interop.formats.mapping import HUGGING_FACE, tensor_shapes
from herd_jax.interop.formats.safetensors import SafetensorsFiles, write_safetensors
from herd_jax.interop.load import open_source
from herd_jax.interop.save import convert, save
from herd_jax.models.rope import RopeScaling
from herd_jax.text.tokenizer import load_tokenizer


@pytest.fixture
def model(tmp_path):
    save_random(tmp_path / "model")
    return tmp_path / "model"


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def change_config(model, **changes):
    path = model / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"model_type": "mistral"}, "of a model of type mistral: only plain Llamas"),
        ({"attention_bias": True}, "has attention_bias true: only plain Llamas"),
        ({"mlp_bias": True}, "has mlp_bias true"),
        ({"hidden_act": "gelu"}, 'has hidden_act "gelu"'),
        ({"sliding_window": 4096}, "has sliding_window 4096"),
        ({"num_local_experts": 8}, "has num_local_experts 8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "has quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scales RoPE in the way 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "scales RoPE in the way 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "scales RoPE in the way 'dynamic'"),
        ({"intermediate_size": 50}, r"layers.0.mlp.down_proj.weight in .* is \[32, 48\] and its config asks for \[32, 50\]"),
        ({"num_hidden_layers": 6}, "lacks the tensor model.layers.5.input_layernorm.weight"),
        ({"num_hidden_layers": 4}, "has the tensor model.layers.4.input_layernorm.weight, which a Llama of its config has not"),
        ({"hidden_size": ...}, "config.json lacks hidden_size"),
        ({"num_key_value_heads": 3}, "model.num_heads 16 does not divide by model.num_kv_heads 3"),
        ({"hidden_size": "32"}, "config.json is not the description of a model"),
    ],
)
def test_configs(model, changes, match):
    change_config(model, **changes)
    refused(model, match)


def test_truncated_and_damaged_files(model):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(model, "model.safetensors is truncated or no safetensors file: copy it again")
    path.write_bytes(whole.replace(b'"BF16"', b'"BF17"', 1))
    refused(model, "is stored as BF17: only F32, F16, BF16, F8_E4M3 are read, so take an unquantized copy")
    path.unlink()
    refused(model, "holds no safetensors")
    (model / "config.json").write_text("{")
    refused(model, "config.json is not the description of a model: copy it again")


def test_missing_shard(tmp_path, model, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_FILE_BYTES", 20_000)
    convert(model, tmp_path / "many", "huggingface")
    shard = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "many", f"lacks {shard.name}, which its index names: copy that file too")


def test_a_tied_model_may_repeat_its_output(model, tmp_path):
    """Some checkpoints have lm_head.weight beside tied embeddings; transformers ignores it, too."""
    shapes, files = tensor_shapes(HUGGING_FACE.map(tiny.CONFIG)), SafetensorsFiles([model / "model.safetensors"])
    extra = {**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    arrays = [np.array(files.read(name)) for name in shapes] + [np.zeros(2, np.float32).astype(files.dtypes["lm_head.weight"])]
    write_safetensors(model, extra, dict.fromkeys(extra, np.dtype("bfloat16")), arrays)
    change_config(model, tie_word_embeddings=True)
    assert open_source(model).config == tiny.tied()


def test_what_is_no_model(tmp_path):
    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path, "holds no model: one has config.json")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", "is no GGUF file")
    (tmp_path / "checkpoints").mkdir()
    refused(tmp_path, "has no readable checkpoint")


def test_tokenizer_of_another_model(tmp_path, model):
    with pytest.raises(UserError, match="has 259 ids and the model's vocabulary 61 rows"):
        save_random(tmp_path / "new", tokenizer=load_tokenizer("bytes"))
    load_tokenizer("bytes").save(model)
    (model / "tokenizer.bytes").rename(model / "tokenizer.model")
    with pytest.raises(UserError, match="has 259 ids and the model's vocabulary 61 rows"):
        convert(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("to", ["herd", "huggingface", "meta"])
def test_a_failed_conversion_leaves_nothing(tmp_path, to):
    if to == "meta":
        pytest.importorskip("torch")
    config = dataclasses.replace(tiny.CONFIG, dim=64, rope_scaling=RopeScaling(8.0))
    read = random_model(config)

    def fails(name, layer):
        assert not (tmp_path / "new").exists()  # nor would it after a kill
        if name == "layers.qkv":
            raise UserError("the disk is full")
        return read(name, layer)

    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path / "new", to, config, fails, "bfloat16")
    assert not list(tmp_path.iterdir())


def test_targets(tmp_path, model):
    with pytest.raises(UserError, match="model exists: name a new directory"):
        convert(model, model)
    with pytest.raises(UserError, match="--to is 'gguf': it must be one of herd, huggingface, meta"):
        convert(model, tmp_path / "new", "gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        convert(model, tmp_path / "file" / "new")


def test_herd_directories(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, vocab_size=300)
    save_random(tmp_path / "herd", config, "herd", tokenizer=load_tokenizer("bytes"), context_length=77)
    source = open_source(tmp_path / "herd")
    assert source.context_length == 77 and source.tokenizer.encode("a") == [97]
    values = json.loads((tmp_path / "herd" / "herd.json").read_text())
    values["model"]["num_layers"] = 6
    (tmp_path / "herd" / "herd.json").write_text(json.dumps(values))
    refused(tmp_path / "herd", "lacks the tensor layers.attention_norm.5")
    (tmp_path / "herd" / "herd.json").write_text("{}")
    refused(tmp_path / "herd", "herd.json lacks model")
