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


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


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
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "has the rope_theta 7.0 and"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling that contradict each other"),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "has the rope_type llama3 and the type linear in rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "has partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "mscale": 2.0}}, "has rope_parameters.mscale 2.0, of which it is not known"),
        ({"residual_multiplier": 0.22}, "has residual_multiplier 0.22, of which it is not known here whether it changes what"),
        ({"attn_logit_softcapping": 50.0}, "has attn_logit_softcapping 50.0"),
        ({"is_causal": False}, "has is_causal false: only plain Llamas"),
        ({"partial_rotary_factor": 0.0}, "has partial_rotary_factor 0.0"),
        ({"rope_interleaved": True}, "has rope_interleaved true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has layer_types sliding_attention"),
        ({"architectures": ["LlamaForTokenClassification"]}, "is of a LlamaForTokenClassification: only language models"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is of a classifier with 2 labels: only reward models"),
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


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": None},
        {"rope_interleaved": False, "attention_multiplier": None, "unsloth_version": "2025.1", "transformers.js_config": {"dtype": "q4"}},
        {"layer_types": ["full_attention"] * 3, "_attn_implementation_autoset": True, "max_length": 20, "is_llama_config": True},
    ],
)
def test_configs_with_fields_that_change_nothing(model, changes):
    expected = open_source(model).config
    change_config(model, **changes)
    assert open_source(model).config == expected


def test_a_stale_index_beside_the_only_file(model, monkeypatch, tmp_path):
    """transformers loads model.safetensors where it is there."""
    monkeypatch.setattr(safetensors, "MAX_FILE_BYTES", 20_000)
    save_random(tmp_path / "old")
    expected = open_source(model).read("ends.head.norm")
    for path in (tmp_path / "old").glob("*.safetensors*"):
        path.rename(model / path.name)
    assert (model / "model.safetensors.index.json").exists()
    for shard in model.glob("model-*.safetensors"):
        shard.unlink()
    np.testing.assert_array_equal(open_source(model).read("ends.head.norm"), expected)


def test_pointers_of_git_lfs_are_named(model):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("model.safetensors", "tokenizer.json"):
        (model / name).write_bytes(pointer)
    refused(model, "model.safetensors is a pointer of Git LFS in place of the file: fetch it with git lfs pull")
    with pytest.raises(UserError, match="tokenizer.json is a pointer of Git LFS"):
        load_tokenizer(model)


def test_double_precision_is_not_called_quantized(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F64" ', 1))
    refused(model, "is stored as F64: only .* are read, so save it again in one of them")


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
    """Some checkpoints have lm_head.weight beside tied embeddings. Where it is another matrix, it is the model's, as in transformers 5."""
    shapes, files = tensor_shapes(HUGGING_FACE.map(tiny.CONFIG)), SafetensorsFiles([model / "model.safetensors"])
    extra = {**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    tensors = {name: np.array(files.read(name)) for name in shapes}
    rotary = np.zeros(2, np.float32).astype(files.dtypes["lm_head.weight"])
    change_config(model, tie_word_embeddings=True)
    assert open_source(model).config == tiny.CONFIG
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_safetensors(model, extra, dict.fromkeys(extra, np.dtype("bfloat16")), lambda _: iter([*tensors.values(), rotary]))
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
