"""GGUF files, dequantized to float32 one tensor at a time. RoPE rotates adjacent pairs there, and its scaling is a tensor of divisors."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from herd_jax.errors import UserError
from herd_jax.files import refuse_pointer
from herd_jax.interop.formats.mapping import GGUF
from herd_jax.interop.source import MappedSource, Source, refuse_unknown, tokenizer_in
from herd_jax.models.config import LlamaConfig
from herd_jax.models.rope import RopeScaling, frequencies
from herd_jax.text.gguf_tokenizer import PRE_TOKENIZERS
from herd_jax.text.protocol import import_extra

TOKENIZER_KIND = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
ROPE_DIVISORS = "rope_freqs.weight"
READ = {"context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
        "attention.key_length", "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.type", "vocab_size"}  # fmt: skip
HARMLESS = {"tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"}  # these two say how a scaling came about


def open_gguf(path: Path) -> Source:
    """Opens a GGUF file. Raises UserError for what is no Llama, for a damaged file, and for tensors that do not fit the config."""
    gguf = import_extra("gguf", "a GGUF file", "gguf")
    refuse_pointer(path)
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        tensors = _Tensors(gguf, path, reader)
        if any(tensor.data_offset + tensor.n_bytes > path.stat().st_size for tensor in reader.tensors):
            raise ValueError("truncated")
    except (ValueError, IndexError, KeyError) as error:  # what reading past the end of the mapped file raises
        raise UserError(f"{path} is truncated or no GGUF file: copy it again") from error
    try:
        config = parse_config(values, path, tensors)
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]}: take a complete copy of the model") from error
    tokenizer_path = _tokenizer_of(path, {name: reader.fields[name].contents() for name in TOKENIZER_KIND if name in reader.fields})
    return MappedSource.make(path, config, values.get("llama.context_length"), tokenizer_path, GGUF.map(config), tensors, (ROPE_DIVISORS,))


def parse_config(values: dict[str, Any], path: Path, tensors: "_Tensors") -> LlamaConfig:
    """Returns the config from the metadata. Raises UserError for what is not a plain Llama, KeyError for a field that every file has."""
    if values.get("general.architecture") != "llama":
        raise UserError(f"{path} is of the architecture {values.get('general.architecture')}: only plain Llamas (llama) are read")
    if values.get("split.count", 1) > 1:
        raise UserError(f"{path} is one of {values['split.count']} parts: join them with llama-gguf-split --merge")
    if values.get("llama.expert_count", 0):
        raise UserError(f"{path} has {values['llama.expert_count']} experts: only plain Llamas, without experts, are read")
    if (kind := values.get("llama.rope.scaling.type", "none")) != "none":
        raise UserError(f"{path} scales RoPE in the way '{kind}': only that of Llama 3.1 and none are read")
    dim, num_heads = values["llama.embedding_length"], _of_all_layers(values["llama.attention.head_count"], "attention.head_count", path)
    head_dim = values.get("llama.attention.key_length", dim // num_heads)
    plain = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0,
             "rope.scaling.attn_factor": 1.0, "attention.causal": True}  # fmt: skip
    for name, expected in plain.items():
        value = values.get(f"llama.{name}", expected)
        if value != expected and not (isinstance(expected, float) and value == 0):  # a factor of 0 is none
            raise UserError(f"{path} has llama.{name} {value}: only plain Llamas ({name} {expected}) are read")
    of_model = {name.removeprefix("llama."): value for name, value in values.items() if name.startswith("llama.")}
    refuse_unknown(of_model, READ | HARMLESS | plain.keys(), (), path, "llama.")
    theta = _shortest(values.get("llama.rope.freq_base", 10_000.0))
    return LlamaConfig(
        dim=dim,
        num_layers=values["llama.block_count"],
        num_heads=num_heads,
        num_kv_heads=_of_all_layers(values.get("llama.attention.head_count_kv", num_heads), "attention.head_count_kv", path),
        head_dim=head_dim,
        ffn_dim=_of_all_layers(values["llama.feed_forward_length"], "feed_forward_length", path),
        vocab_size=values.get("llama.vocab_size") or tensors.shapes[GGUF.embedding][0],
        rope_theta=theta,
        rope_scaling=_parse_rope_scaling(path, head_dim, theta, tensors),
        norm_eps=_shortest(values["llama.attention.layer_norm_rms_epsilon"]),
        tie_embeddings=GGUF.output not in tensors.shapes,
    )


def _tokenizer_of(path: Path, kind: dict[str, str]) -> Path | None:
    """Returns the path of the file's tokenizer: itself, or what lies beside where its own is of a kind that is not read."""
    model, pre = (kind.get(name) for name in TOKENIZER_KIND)
    if model == "llama" or model == "gpt2" and pre in PRE_TOKENIZERS:
        return path
    beside = tokenizer_in(path.parent)
    if model and not beside:
        print(
            f"note: {path} has a tokenizer of the kind {model} that splits text in the way {pre}, which is not known here: the model is read without "
            "one; put the tokenizer.json of the original model beside it",
            file=sys.stderr,
        )
    return beside


def _of_all_layers(value: int | list[int], name: str, path: Path) -> int:
    """Returns a number, of which a file may have one for each layer. Raises UserError where these differ."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise UserError(f"{path} has a llama.{name} of its own for each layer ({', '.join(map(str, value[:8]))} ...): only models whose layers are alike are read")
    return value[0]


def _parse_rope_scaling(path: Path, head_dim: int, theta: float, tensors: "_Tensors") -> RopeScaling | None:
    """Returns the scaling of Llama 3.1 that gives the file's divisors of the frequencies. Raises UserError where none does."""
    if ROPE_DIVISORS not in tensors.shapes:
        return None
    divisors = tensors.read(ROPE_DIVISORS)
    scaling = RopeScaling(factor=float(divisors.max()))
    if divisors.shape != (head_dim // 2,) or not np.allclose(
        frequencies(head_dim, theta, None) / divisors, frequencies(head_dim, theta, scaling), rtol=1e-4, atol=0
    ):
        raise UserError(f"{path} scales RoPE otherwise than Llama 3.1 ({ROPE_DIVISORS}): only that and none are read")
    return scaling


def _shortest(value: float) -> float:
    """Returns the number that was meant by one stored in 32 bits: 1e-5 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Tensors:
    def __init__(self, gguf, path: Path, reader):
        self._quants, self._path = gguf.quants, path
        self._tensors = {t.name: (t.tensor_type, t.data.dtype, int(t.data_offset), t.data.shape) for t in reader.tensors}
        self.shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the tensor, or the part that `slices` take: only its rows are dequantized."""
        kind, *place = self._tensors[name]
        return self._quants.dequantize(np.memmap(self._path, place[0], "r", *place[1:])[slices[:1]], kind)[:, *slices[1:]]
