"""Our exports, field by field, against what vLLM's loader of Llamas reads (vllm/model_executor/models/llama.py and layers/quantization/
fbgemm_fp8.py): vLLM itself needs a GPU, and has not been run.

It fuses q, k and v, and gate and up, out of the files' tensors; looks up every other tensor by its own name; leaves out lm_head where config.json
ties it; and takes a layer as FP8 unless the full name of each of its parts is in modules_to_not_convert.
"""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import tiny
from random_models import save_random

from herd_jax.interop.formats.safetensors import SafetensorsFiles, files_of
from herd_jax.interop.operations.quantize import quantize
from herd_jax.models.rope import RopeScaling

FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2), "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def parts_of_a_layer(config: dict) -> dict[str, list[int]]:
    """What vLLM allocates for a layer: the rows of each part of each linear, and their columns last."""
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    return {
        "self_attn.qkv_proj": [q, kv, kv, hidden],
        "self_attn.o_proj": [hidden, q],
        "mlp.gate_up_proj": [ffn, ffn, hidden],
        "mlp.down_proj": [hidden, ffn],
    }


def wanted(config: dict) -> dict[tuple[str, int], tuple[str, tuple[int, ...]]]:
    """(parameter, part) -> (dtype, shape) of everything that vLLM waits for."""
    hidden, vocabulary, plain = config["hidden_size"], config["vocab_size"], config["torch_dtype"]
    table = {("model.embed_tokens.weight", 0): (plain, (vocabulary, hidden)), ("model.norm.weight", 0): (plain, (hidden,))}
    if not config["tie_word_embeddings"]:
        table["lm_head.weight", 0] = plain, (vocabulary, hidden)
    quantization = config.get("quantization_config")
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        table |= {(f"{layer}.{norm}.weight", 0): (plain, (hidden,)) for norm in ("input_layernorm", "post_attention_layernorm")}
        for linear, (*rows, columns) in parts_of_a_layer(config).items():
            is_fp8 = quantization is not None and not is_skipped(f"{layer}.{linear}", quantization["modules_to_not_convert"])
            for part, size in enumerate(rows):
                table[f"{layer}.{linear}.weight", part] = ("float8_e4m3fn" if is_fp8 else plain), (size, columns)
                if is_fp8:
                    table[f"{layer}.{linear}.weight_scale", part] = "float32", (size, 1)
    return table


def is_skipped(linear: str, not_converted: list[str]) -> bool:
    stem, name = linear.rsplit(".", 1)
    parts = [part for part, (fused, _) in FUSED.items() if fused == name] or [name]
    (answer,) = {f"{stem}.{part}" in not_converted for part in parts}  # vLLM refuses a linear of which only some parts are quantized
    return answer


def placed(name: str) -> tuple[str, int]:
    """Where vLLM puts a tensor of a file."""
    for part, (fused, number) in FUSED.items():
        if f".{part}." in name:
            return name.replace(part, fused), number
    return name, 0


CONFIGS = {
    "plain": tiny.CONFIG,
    "tied": tiny.tied(),
    "rope of Llama 3.1": dataclasses.replace(tiny.CONFIG, rope_scaling=RopeScaling(8.0)),
    "odd heads": dataclasses.replace(tiny.CONFIG, num_heads=3, num_kv_heads=1, head_dim=10),
}


@pytest.mark.parametrize("kind", [*CONFIGS, "fp8"])
def test_every_tensor_is_waited_for_and_every_parameter_comes_once(kind, tmp_path):
    save_random(tmp_path / "plain", CONFIGS.get(kind, tiny.CONFIG))
    directory = tmp_path / "plain"
    if kind == "fp8":
        quantize(directory, tmp_path / "fp8", "huggingface")
        directory = tmp_path / "fp8"
    config, tensors = json.loads((directory / "config.json").read_text()), SafetensorsFiles(files_of(directory))
    found = {placed(name): (tensors.dtypes[name].name, shape) for name, shape in tensors.shapes.items()}
    assert len(found) == len(tensors.shapes)
    assert found == wanted(config)
    assert kind != "fp8" or any(dtype == E4M3.name for dtype, _ in found.values())


@pytest.mark.parametrize("kind", [*CONFIGS, "fp8"])
def test_fields_of_the_config_that_are_read(kind, tmp_path):
    ours = CONFIGS.get(kind, tiny.CONFIG)
    save_random(tmp_path / "plain", ours)
    directory = tmp_path / "plain"
    if kind == "fp8":
        quantize(directory, tmp_path / "fp8", "huggingface")
        directory = tmp_path / "fp8"
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]  # by which the class is found
    assert config["hidden_act"] == "silu"  # the only one that its MLP takes
    assert not config["attention_bias"] and not config["mlp_bias"]
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (ours.norm_eps, ours.rope_theta, ours.head_dim)
    assert config["max_position_embeddings"] > 0 and config["torch_dtype"] in ("float32", "float16", "bfloat16")
    scaling = config["rope_scaling"]
    if ours.rope_scaling is None:
        assert scaling is None
    else:
        names = {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        assert set(scaling) == names and scaling["rope_type"] == "llama3" and scaling["factor"] == ours.rope_scaling.factor
    if kind == "fp8":
        assert config["quantization_config"]["quant_method"] == "fbgemm_fp8"
        assert config["quantization_config"]["activation_scale_ub"] == 1200.0
