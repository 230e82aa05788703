"""Hugging Face directories: config.json, safetensors, tokenizer. What is not a plain Llama is an error that names the reason."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from herd_jax.errors import UserError
from herd_jax.interop.formats import huggingface_fp8
from herd_jax.interop.formats.huggingface_tokenizer import write_tokenizer
from herd_jax.interop.formats.mapping import HUGGING_FACE, Mapped, tensor_dtypes, tensor_shapes
from herd_jax.interop.formats.safetensors import SafetensorsFiles, files_of, write_safetensors
from herd_jax.interop.source import MappedSource, Source, parse_json, tokenizer_in
from herd_jax.models.config import LlamaConfig
from herd_jax.models.rope import RopeScaling
from herd_jax.text.protocol import GENERATION_FILE, SPECIAL_ID_FIELDS, Tokenizer

CONFIG_FILE = "config.json"
# What a Llama's config says in these fields, if it has them.
PLAIN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "num_local_experts": None,
    "partial_rotary_factor": 1.0,
}
ROPE_FIELDS = {  # field of RopeScaling -> Hugging Face's name
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}


def open_huggingface(directory: Path) -> Source:
    """Opens a Hugging Face directory. Raises UserError for what is no Llama, damaged files, and tensors that do not fit the config."""
    path = directory / CONFIG_FILE
    config, context_length = parse_json(path, lambda values: (parse_config(values, path), values.get("max_position_embeddings")))
    if not list(directory.glob("*.safetensors*")):
        raise UserError(f"{directory} holds no safetensors: save the model with safe_serialization=True, pickles are not read here")
    ignored = ("rotary_emb.inv_freq", *(["lm_head.weight"] if config.tie_embeddings else []))
    tensors = SafetensorsFiles(files_of(directory))
    return MappedSource.make(directory, config, context_length, tokenizer_in(directory), map_parameters(config), tensors, ignored)


def parse_config(values: dict[str, Any], path: Path) -> LlamaConfig:
    """Returns the config from config.json. Raises UserError for what is not a plain Llama, KeyError for a field that every config has."""
    if values.get("model_type") != "llama":
        raise UserError(f"{path} is of a model of type {values.get('model_type')}: only plain Llamas (llama) are read")
    for field, plain in PLAIN.items():
        if (values.get(field) or plain) != plain:
            raise UserError(f"{path} has {field} {json.dumps(values[field])}: only plain Llamas ({field} {json.dumps(plain)}) are read")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    quantization = values.get("quantization_config")
    num_heads = values["num_attention_heads"]
    return LlamaConfig(
        dim=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads") or num_heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // num_heads,
        ffn_dim=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0),
        rope_scaling=_parse_rope_scaling(rope, path),
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values.get("tie_word_embeddings", False),
        init_std=values.get("initializer_range", 0.02),
        fp8=huggingface_fp8.parse(quantization, values["num_hidden_layers"], path) if quantization else None,
    )


def _parse_rope_scaling(values: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path} scales RoPE in the way '{kind}': only 'llama3' and none are read")
    return RopeScaling(**{ours: values[theirs] for ours, theirs in ROPE_FIELDS.items()})


def make_config(config: LlamaConfig, dtype: str, context_length: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns config.json, with the fields that transformers 4 and 5 and vLLM all read."""
    c, scaling = config, config.rope_scaling
    rope_scaling = scaling and {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in ROPE_FIELDS.items()}}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": c.dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": context_length,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope_scaling,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "torch_dtype": dtype,
        "use_cache": True,
        **make_generation_config(tokenizer),
        **({"quantization_config": huggingface_fp8.make(c.fp8, c.num_layers)} if c.fp8 else {}),
    }


def make_generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    return tokenizer.generation_config if tokenizer else dict.fromkeys(SPECIAL_ID_FIELDS)


def map_parameters(config: LlamaConfig) -> dict[str, Mapped]:
    return HUGGING_FACE.map(config)


def write(directory: Path, config: LlamaConfig, dtype: np.dtype, arrays: Iterable[np.ndarray], tokenizer: Tokenizer | None,
          context_length: int) -> None:  # fmt: skip
    """Writes what AutoModelForCausalLM, AutoTokenizer and vLLM load as it stands."""
    if tokenizer:
        write_tokenizer(directory, tokenizer, context_length)
    mapping = map_parameters(config)
    write_safetensors(directory, tensor_shapes(mapping), tensor_dtypes(mapping, dtype), arrays)
    path = directory / GENERATION_FILE  # the tokenizer may have brought one, with more in it
    generation = (json.loads(path.read_bytes()) if path.exists() else {}) | make_generation_config(tokenizer)
    path.write_text(json.dumps(generation, indent=2) + "\n")
    (directory / CONFIG_FILE).write_text(json.dumps(make_config(config, dtype.name, context_length, tokenizer), indent=2) + "\n")
