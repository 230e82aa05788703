"""Hugging Face directories: config.json, safetensors, tokenizer. What is not a plain Llama is an error that names the reason."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from herd_jax.errors import UserError
from herd_jax.interop.formats import huggingface_fp8
from herd_jax.interop.formats.huggingface_tokenizer import write_tokenizer
from herd_jax.interop.formats.mapping import HUGGING_FACE, Mapped, tensor_dtypes, tensor_shapes
from herd_jax.interop.formats.safetensors import SafetensorsFiles, files_of, write_safetensors
from herd_jax.interop.source import Arrays, Export, MappedSource, Source, parse_json, refuse_unknown, tokenizer_in
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
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_causal": True,
}
READ = {
    *("model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "rms_norm_eps"),
    *("tie_word_embeddings", "initializer_range", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "layer_types"),
}
# Fields that every config of transformers may have, and that other programs add; they say nothing of what the model computes.
HARMLESS = {
    *("torch_dtype", "dtype", "use_cache", "pretraining_tp", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "max_length"),
    *("min_length", "do_sample", "temperature", "top_p", "top_k", "num_beams", "num_beam_groups", "diversity_penalty", "typical_p", "length_penalty"),
    *("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "id2label", "label2id"),
    *("chunk_size_feed_forward", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "processor_class", "auto_map"),
    *("sep_token_id", "unk_token_id", "decoder_start_token_id", "max_sequence_length", "model_max_length", "gradient_checkpointing"),
    *("is_llama_config", "is_decoder", "bos_token", "eos_token", "pad_token", "unk_token", "attn_implementation", "license", "base_model", "num_labels"),
}
HARMLESS_BEGINNINGS = ("_", "transformers", "unsloth", "tokenizer_", "output_", "return_dict")
ROPE_READ = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
ROPE_FIELDS = {  # field of RopeScaling -> Hugging Face's name
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}


REWARD_MODEL = "LlamaForSequenceClassification"  # with one label


def open_huggingface(directory: Path) -> Source:
    """Opens a Hugging Face directory. Raises UserError for what is no Llama, damaged files, and tensors that do not fit the config."""
    path = directory / CONFIG_FILE
    config, context_length = parse_json(path, lambda values: (parse_config(values, path), values.get("max_position_embeddings")))
    if not list(directory.glob("*.safetensors*")):
        raise UserError(f"{directory} holds no safetensors: save the model with safe_serialization=True, pickles are not read here")
    tensors = SafetensorsFiles(files_of(directory))
    if config.tie_embeddings and _has_output_of_its_own(tensors):
        config = dataclasses.replace(config, tie_embeddings=False)
    ignored = ("rotary_emb.inv_freq", *([HUGGING_FACE.output] if config.tie_embeddings else []))
    return MappedSource.make(directory, config, context_length, tokenizer_in(directory), map_parameters(config), tensors, ignored)


def _has_output_of_its_own(tensors: SafetensorsFiles) -> bool:
    """Returns whether there is an output matrix beside the embedding to which the config ties it, and it differs: transformers 5 then keeps it."""
    names = (HUGGING_FACE.embedding, HUGGING_FACE.output)
    if not set(names) <= tensors.shapes.keys():
        return False
    embedding, output = map(tensors.read, names)
    return embedding.shape != output.shape or not (np.array_equal(embedding[:64], output[:64]) and np.array_equal(embedding, output))


def parse_config(values: dict[str, Any], path: Path) -> LlamaConfig:
    """Returns the config from config.json. Raises UserError for what is not a plain Llama, or has a field of which it is not known whether it
    changes what is computed; KeyError for a field that every config has."""
    if values.get("model_type") != "llama":
        raise UserError(f"{path} is of a model of type {values.get('model_type')}: only plain Llamas (llama) are read")
    is_reward = REWARD_MODEL in (values.get("architectures") or [])
    heads = [name for name in values.get("architectures") or [] if name.startswith("Llama") and name not in ("LlamaForCausalLM", REWARD_MODEL)]
    if heads:
        raise UserError(f"{path} is of a {heads[0]}: only language models (LlamaForCausalLM) and reward models ({REWARD_MODEL}) are read")
    num_labels = len(values.get("id2label") or (0, 1))  # transformers has two where nothing is said
    if is_reward and values.get("num_labels", num_labels) != 1:
        raise UserError(f"{path} is of a classifier with {values.get('num_labels', num_labels)} labels: only reward models, which have one, are read")
    for field, plain in PLAIN.items():
        if (value := values.get(field)) is not None and value != plain and (value or plain):
            raise UserError(f"{path} has {field} {json.dumps(values[field])}: only plain Llamas ({field} {json.dumps(plain)}) are read")
    if odd := {*(values.get("layer_types") or ["full_attention"])} - {"full_attention"}:
        raise UserError(f"{path} has layer_types {', '.join(sorted(odd))}: only plain Llamas (full_attention) are read")
    refuse_unknown(values, READ | HARMLESS | PLAIN.keys(), HARMLESS_BEGINNINGS, path)
    theta, scaling = _parse_rope(values, path)
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
        rope_theta=float(theta or 10_000.0),
        rope_scaling=scaling,
        norm_eps=values["rms_norm_eps"],
        tie_embeddings=values.get("tie_word_embeddings") or False,
        init_std=values.get("initializer_range", 0.02),
        fp8=huggingface_fp8.parse(quantization, values["num_hidden_layers"], path) if quantization else None,
        reward=is_reward,
    )


def _parse_rope(values: dict[str, Any], path: Path) -> tuple[float | None, RopeScaling | None]:
    """Returns theta and the scaling. transformers 5 writes both into rope_parameters, transformers 4 into rope_theta and rope_scaling; raises
    UserError where a config has both ways and they contradict each other."""
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    for name, of in (("rope_parameters", new), ("rope_scaling", old)):
        kinds = {of[field] for field in ("rope_type", "type") if of.get(field)}
        if len(kinds) > 1:
            raise UserError(f"{path} has the rope_type {of['rope_type']} and the type {of['type']} in {name}: keep the right one")
        if (of.get("partial_rotary_factor") or 1.0) != 1.0:
            raise UserError(f"{path} has partial_rotary_factor {of['partial_rotary_factor']}: only plain Llamas (partial_rotary_factor 1.0) are read")
        refuse_unknown(of, ROPE_READ | {"partial_rotary_factor"}, (), path, f"{name}.")
    thetas = {float(theta) for theta in (new.get("rope_theta"), old.get("rope_theta"), values.get("rope_theta")) if theta}
    if len(thetas) > 1:
        raise UserError(f"{path} has the rope_theta {' and '.join(map(str, sorted(thetas)))}: keep the right one")
    scaling = _parse_rope_scaling(new or old, path)
    if new and old and _parse_rope_scaling(old, path) != scaling:
        raise UserError(f"{path} has rope_parameters and rope_scaling that contradict each other: keep the right one")
    return next(iter(thetas), None), scaling


def _parse_rope_scaling(values: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = values.get("rope_type") or values.get("type") or "default"
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
        "architectures": [REWARD_MODEL if c.reward else "LlamaForCausalLM"],
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
        **({"id2label": {"0": "reward"}, "label2id": {"reward": 0}} if c.reward else {}),
        **({"quantization_config": huggingface_fp8.make(c.fp8, c.num_layers)} if c.fp8 else {}),
    }


def make_generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    return tokenizer.generation_config if tokenizer else dict.fromkeys(SPECIAL_ID_FIELDS)


def map_parameters(config: LlamaConfig) -> dict[str, Mapped]:
    return HUGGING_FACE.map(config)


def describe(directory: Path, export: Export) -> None:
    """Writes all but the weights, so that AutoModelForCausalLM, AutoTokenizer and vLLM load it as it stands."""
    tokenizer = export.tokenizer
    if tokenizer:
        write_tokenizer(directory, tokenizer, export.context_length)
    path = directory / GENERATION_FILE  # the tokenizer may have brought one, with more in it
    generation = (json.loads(path.read_bytes()) if path.exists() else {}) | make_generation_config(tokenizer)
    path.write_text(json.dumps(generation, indent=2) + "\n")
    values = make_config(export.config, export.dtype.name, export.context_length, tokenizer)
    (directory / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


def write(directory: Path, export: Export, arrays: Arrays) -> None:
    """Writes this process's files of weights."""
    mapping = map_parameters(export.config)
    write_safetensors(directory, tensor_shapes(mapping), tensor_dtypes(mapping, export.dtype), arrays)
