"""Meta directories: params.json, consolidated.NN.pth (one for each rank of model parallelism), tokenizer.model. RoPE rotates adjacent pairs."""

import dataclasses
import json
import mmap
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from herd_jax.errors import UserError
from herd_jax.files import refuse_pointer
from herd_jax.interop.formats.mapping import META, Mapped, tensor_shapes
from herd_jax.interop.source import Arrays, Export, MappedSource, Source, parse_json, refuse_unknown, tokenizer_in
from herd_jax.models.config import LlamaConfig
from herd_jax.models.rope import RopeScaling
from herd_jax.text.protocol import import_extra

CONFIG_FILE = "params.json"
READ = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "hidden_dim", "ffn_dim_multiplier", "multiple_of", "norm_eps",
        "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_batch_size", "max_seq_len",
        "model_parallel_size"}  # fmt: skip
NOT_PLAIN = ("moe_args", "quantization_args", "lora_args", "vision_chunk_size")
DEFAULT_SCALING = RopeScaling(factor=8.0)  # what use_scaled_rope stands for; 32 in the tied models of Llama 3.2


def map_parameters(config: LlamaConfig) -> dict[str, Mapped]:
    return META.map(config)


def open_meta(directory: Path) -> Source:
    """Opens a Meta directory. Raises UserError for what is no Llama, damaged files, pickles with code, and tensors that do not fit the config."""
    found, path = sorted(directory.glob("consolidated.*.pth")), directory / CONFIG_FILE
    paths = [directory / f"consolidated.{rank:02}.pth" for rank in range(max(1, len(found)))]
    for missing in paths:
        if missing not in found:
            raise UserError(f"{directory} lacks {missing.name}: copy that file too")
    config = parse_json(path, lambda values: parse_config(values, path, paths))
    shards = _Shards(paths, config)
    config = dataclasses.replace(config, num_kv_heads=config.num_kv_heads // shards.num_copies)
    ignored = ("rope.freqs", *([META.output] if config.tie_embeddings else []))
    return MappedSource.make(directory, config, None, tokenizer_in(directory), map_parameters(config), shards, ignored)


def parse_config(values: dict[str, Any], path: Path, paths: list[Path]) -> LlamaConfig:
    """Returns the config from params.json; only the tensors tell whether the embedding is tied, and sometimes how large the vocabulary is."""
    for field in NOT_PLAIN:
        if values.get(field, -1) not in (None, -1):
            raise UserError(f"{path} has {field}: only plain Llamas, without experts, images or quantization, are read")
    refuse_unknown({name: value for name, value in values.items() if value != -1}, READ, (), path)
    dim, num_heads = values["dim"], values["n_heads"]
    tied = all(_is_tied(_load(shard)) for shard in paths)
    scaling = None
    if values.get("use_scaled_rope"):
        factor = values.get("rope_scaling_factor") or (32.0 if tied else DEFAULT_SCALING.factor)
        scaling = RopeScaling(factor, high_freq_factor=values.get("rope_high_freq_factor") or DEFAULT_SCALING.high_freq_factor)
    return LlamaConfig(
        dim=dim,
        num_layers=values["n_layers"],
        num_heads=num_heads,
        num_kv_heads=values.get("n_kv_heads") or num_heads,
        head_dim=values.get("head_dim") or dim // num_heads,
        ffn_dim=values.get("hidden_dim") or ffn_dim(dim, values.get("ffn_dim_multiplier"), values["multiple_of"]),
        vocab_size=values["vocab_size"] if values.get("vocab_size", -1) > 0 else len(_load(paths[0])[META.output]) * len(paths),
        rope_theta=float(values.get("rope_theta", 10_000.0)),
        rope_scaling=scaling,
        norm_eps=values["norm_eps"],
        tie_embeddings=tied,
    )


def ffn_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Returns the feed-forward dim by Meta's rule: two thirds of 4 x dim, times the multiplier, rounded up to a multiple of `multiple_of`."""
    hidden = int(2 * 4 * dim / 3)
    hidden = int(multiplier * hidden) if multiplier else hidden
    return -(-hidden // multiple_of) * multiple_of


def make_config(config: LlamaConfig, tp: int = 1) -> dict[str, Any]:
    """Returns params.json. Raises UserError for a model that it cannot describe, or that `tp` ranks cannot share."""
    c = config
    if tp < 1:
        raise UserError(f"tp is {tp}: it must be 1 or more")
    for what, number in (("heads", c.num_heads), ("key and value heads", c.num_kv_heads), ("feed-forward dims", c.ffn_dim), ("ids", c.vocab_size)):
        if number % tp:
            raise UserError(f"Meta's format for tp {tp} gives each rank as many {what}, and the model has {number}: choose a tp that divides it")
    if c.fp8:
        raise UserError("Meta's format says nothing of which layers are FP8, and this model has some: write herd or huggingface")
    if c.num_heads * c.head_dim != c.dim:
        raise UserError(
            f"Meta's format has head_dim = dim / num_heads, and this model {c.head_dim} for {c.dim} / {c.num_heads}: write huggingface"
        )
    values = {"dim": c.dim, "n_layers": c.num_layers, "n_heads": c.num_heads, "n_kv_heads": c.num_kv_heads, "vocab_size": c.vocab_size}
    values |= {"ffn_dim_multiplier": (c.ffn_dim + 0.5) / int(2 * 4 * c.dim / 3), "multiple_of": 1}
    values |= {"norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "use_scaled_rope": c.rope_scaling is not None}
    if (scaling := c.rope_scaling) is not None:
        if scaling != RopeScaling(scaling.factor, high_freq_factor=scaling.high_freq_factor):
            positions = DEFAULT_SCALING.original_max_position
            raise UserError(f"Meta's format scales RoPE from {positions} positions, this model otherwise: write huggingface")
        values |= {"rope_scaling_factor": scaling.factor, "rope_high_freq_factor": scaling.high_freq_factor}
    return values


def describe(directory: Path, export: Export) -> None:
    """Writes all but the weights. Raises UserError as `make_config` does."""
    values = make_config(export.config, export.tp)
    if export.tokenizer:
        export.tokenizer.save(directory)
    (directory / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


def write(directory: Path, export: Export, arrays: Arrays) -> None:
    """Writes a file for each rank of tensor parallelism: of several processes each writes every so manieth. An output matrix tied to the embedding
    is there by reference."""
    make_config(export.config, export.tp)
    paths = {rank: directory / f"consolidated.{rank:02}.pth" for rank in range(jax.process_index(), export.tp, jax.process_count())}
    torch, shapes = _import_torch(), tensor_shapes(map_parameters(export.config))
    for path in paths.values():
        tensors = {name: _empty(torch, _shape_of_rank(name, shape, export.tp), export.dtype) for name, shape in shapes.items()}
        if export.config.tie_embeddings:
            tensors[META.output] = tensors[META.embedding]
        with torch.serialization.skip_data():
            torch.save(tensors, path)
    for name, array in zip(shapes, arrays(set(shapes) if paths else set())):
        dim = _split_dim(name, array.ndim)
        for rank, path in paths.items():
            part = array if dim is None else np.split(array, export.tp, dim)[rank]
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                _to_numpy(_load(path)[name])[...] = part


def _empty(torch, shape: tuple[int, ...], dtype: np.dtype):
    return torch.empty(shape, dtype=getattr(torch, dtype.name))  # untouched, so without memory


def _shape_of_rank(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    dim = _split_dim(name, len(shape))
    return shape if dim is None else (*shape[:dim], shape[dim] // tp, *shape[dim + 1 :])


def _split_dim(name: str, num_dims: int) -> int | None:
    """Returns the dim of a tensor that the ranks share, as Meta's code for Llama 3 has it; None for a norm, of which each has the whole."""
    if num_dims == 1:
        return None
    return int(name.endswith((META.out.rpartition("}")[2], META.down.rpartition("}")[2])))


class _Shards:
    """The tensors of all ranks put together, as `config` has them; `num_copies`: how often each key and value head is stored, since Meta
    repeats them where there are more ranks than heads."""

    def __init__(self, paths: list[Path], config: LlamaConfig):
        self._paths, self.num_copies = paths, 1
        shards = [_load(path) for path in paths]
        self._parts = {name: [tuple(shard[name].shape) for shard in shards if name in shard] for shard in shards for name in shard}
        for name, parts in self._parts.items():
            if len(parts) < len(paths):
                raise UserError(f"{paths[0].parent} has the tensor {name} in {len(parts)} of its {len(paths)} files: copy them again")
        torch = _import_torch()
        for name, tensor in shards[0].items():
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"{name} in {paths[0]} is stored as {kind}: only float32, float16 and bfloat16 are read, so take an unquantized copy")
        self.dtypes = {name: _to_numpy(tensor).dtype for name, tensor in shards[0].items()}
        self._key_value = {name.format(layer=layer) for name in (META.key, META.value) for layer in range(config.num_layers)}
        self._shapes = tensor_shapes(map_parameters(config))
        if len(paths) == config.num_kv_heads > 1:
            heads = self._joined(META.key.format(layer=0)).reshape(config.num_kv_heads, -1)
            while len(heads) % 2 == 0 and np.array_equal(heads[0::2], heads[1::2]):
                heads = heads[0::2]
            self.num_copies = config.num_kv_heads // len(heads)
        self.shapes = {name: self._shape(name) for name in self._parts}

    def _shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole tensor, or of one rank's part where the parts do not make up the whole that `config` wants."""
        shape, parts = self._shapes.get(name), self._parts[name]
        if shape is None or self._joined_dim(name) is None:
            return parts[0]
        return (shape[0] // self.num_copies, *shape[1:]) if name in self._key_value else shape

    def _joined_dim(self, name: str) -> int | None:
        """Returns the dim in which the ranks' parts are concatenated; -1: each has the whole; None: they do not make up the whole."""
        parts, shape = np.array(self._parts[name]), self._shapes[name]
        if tuple(parts[0]) == shape:
            return -1
        joined = [(*parts[0][:dim], parts[:, dim].sum(), *parts[0][dim + 1 :]) for dim in range(parts.shape[1])]
        return joined.index(shape) if shape in joined else None

    def _joined(self, name: str, slices: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns what the slices take of the ranks' parts put together, from the files that hold some of it."""
        dim = self._joined_dim(name)
        if dim == -1 or len(self._paths) == 1:
            return _to_numpy(_load(self._paths[0])[name])[slices]
        sizes, slices = [part[dim] for part in self._parts[name]], list(slices or [slice(None)] * len(self._parts[name][0]))
        wanted, parts = range(sum(sizes))[slices[dim]], []
        for path, size, end in zip(self._paths, sizes, np.cumsum(sizes).tolist(), strict=True):
            first, last = max(wanted.start - (end - size), 0), min(wanted.stop - (end - size), size)
            if first < last:
                slices[dim] = slice(first, last)
                parts.append(_to_numpy(_load(path)[name])[tuple(slices)])
        return np.concatenate(parts, dim)

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> np.ndarray:
        if self.num_copies == 1 or name not in self._key_value:
            return self._joined(name, slices)
        whole = self._joined(name)
        heads = whole.reshape(-1, self.num_copies, whole.size // len(self._paths))
        if (heads != heads[:, :1]).any():
            raise UserError(f"{name} in {self._paths[0].parent} has heads that should be copies and differ: copy the files again")
        return heads[:, 0].reshape(self.shapes[name])[slices]


def _is_tied(shard) -> bool:
    if META.output not in shard:
        return True
    embedding, output = (_to_numpy(shard[name]) for name in (META.embedding, META.output))
    return embedding.shape == output.shape and np.array_equal(embedding[:64], output[:64]) and np.array_equal(embedding, output)


def _load(path: Path) -> dict[str, Any]:
    """Returns a shard's tensors, mapped anew for each use, so that no pages stay in memory. A pickle with code is an error; it is never run."""
    torch = _import_torch()
    refuse_pointer(path)
    with path.open("rb") as file:
        if file.read(2) == b"\x80\x02" and not zipfile.is_zipfile(path):
            raise UserError(f"{path} is in the format that torch.save had before version 1.6: load it with torch and save it again")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if all(isinstance(value, torch.Tensor) for value in tensors.values()):
            return tensors
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, perhaps code, so it is not read: take the model from its publisher") from error
    except (OSError, RuntimeError, EOFError, AttributeError) as error:
        raise UserError(f"{path} is truncated or no file of torch.save: copy it again") from error
    raise UserError(f"{path} holds more than tensors: take the model from its publisher")


def _to_numpy(tensor) -> np.ndarray:
    """Returns the tensor as an array that shares its memory."""
    torch, tensor = _import_torch(), tensor.detach()
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _import_torch():
    return import_extra("torch", "a checkpoint of Meta", "meta")
