"""GGUF files, dequantized to float32 one tensor at a time. RoPE rotates adjacent pairs there, and its scaling is a tensor of divisors."""

from pathlib import Path
from typing import Any

import numpy as np

from herd_jax.errors import UserError
from herd_jax.interop.formats.mapping import GGUF
from herd_jax.interop.source import MappedSource, Source
from herd_jax.models.config import LlamaConfig
from herd_jax.models.rope import RopeScaling, frequencies
from herd_jax.text.protocol import import_extra

ROPE_DIVISORS = "rope_freqs.weight"


def open_gguf(path: Path) -> Source:
    """Opens a GGUF file. Raises UserError for what is no Llama, for a damaged file, and for tensors that do not fit the config."""
    gguf = import_extra("gguf", "a GGUF file", "gguf")
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
    tokenizer_path = path if "tokenizer.ggml.model" in reader.fields else None
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
    dim, num_heads = values["llama.embedding_length"], values["llama.attention.head_count"]
    head_dim = values.get("llama.attention.key_length", dim // num_heads)
    theta = _shortest(values.get("llama.rope.freq_base", 10_000.0))
    return LlamaConfig(
        dim=dim,
        num_layers=values["llama.block_count"],
        num_heads=num_heads,
        num_kv_heads=values.get("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_dim=values["llama.feed_forward_length"],
        vocab_size=values.get("llama.vocab_size") or tensors.shapes[GGUF.embedding][0],
        rope_theta=theta,
        rope_scaling=_parse_rope_scaling(path, head_dim, theta, tensors),
        norm_eps=_shortest(values["llama.attention.layer_norm_rms_epsilon"]),
        tie_embeddings=GGUF.output not in tensors.shapes,
    )


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

    def read(self, name: str) -> np.ndarray:
        kind, *place = self._tensors[name]
        return self._quants.dequantize(np.memmap(self._path, place[0], "r", *place[1:]), kind)
