"""A model to read from, whatever its format: config, dtype, tokenizer, and every parameter one layer at a time."""

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from herd_jax.errors import UserError
from herd_jax.interop.formats.mapping import Mapped, parameters, tensor_dtypes, tensor_shapes
from herd_jax.models.config import LlamaConfig
from herd_jax.text.tokenizer import Tokenizer, load_tokenizer

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """A model to read from. `dtype` is that of the stored tensors, the widest where they differ; those whose declaration has a dtype of its own
    do not count. `context_length`, in tokens, and `tokenizer_path`, which `load_tokenizer` reads, are None where the source has none."""

    path: Path
    config: LlamaConfig
    dtype: np.dtype
    context_length: int | None
    tokenizer_path: Path | None

    @abc.abstractmethod
    def read(self, name: str, layer: int | None = None, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Returns the part of a parameter that `index` takes (default: all), of one layer if it is a layer's.

        `name` is its path in the declaration ("ends.embed.table", "layers.qkv"), `index` is in its declared shape; "layers.qkv" and
        "layers.gate_up" are not cut in the dim that joins projections. The result has the stored dtype and any memory order, and may be
        a view of a mapped file. Raises UserError where the data is damaged.
        """

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer, or None where the source has none. Raises UserError where it has more ids than the model has rows."""
        tokenizer = self.tokenizer_path and load_tokenizer(self.tokenizer_path)
        if tokenizer:
            check_tokenizer(self.config, tokenizer)
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """Returns a text that is the same for the same weights, wherever they lie: of all dimensions, the norms, and a row of each matrix."""
        digest = hashlib.blake2b(repr(self.config).encode(), digest_size=16)
        for name, declaration in parameters(self.config).items():
            for layer in sorted({declaration.layers[0], declaration.layers[-1]}) if declaration.layers else [None]:
                first = (slice(0, 1), *(slice(None),) * (len(declaration.shape) - 1))
                digest.update(np.ascontiguousarray(self.read(name, layer, first if len(declaration.shape) > 1 else None)).tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Export:
    """A model to write, but for its weights: these in `dtype`, and for `tp` ranks of tensor parallelism where the format has a file for each."""

    config: LlamaConfig
    dtype: np.dtype
    tokenizer: Tokenizer | None
    context_length: int
    tp: int


class Arrays(Protocol):
    """The tensors of a model that is being written."""

    def __call__(self, wanted: set[str]) -> Iterator[np.ndarray]:
        """Yields the tensors of these names in the order of `tensor_shapes`. To be called once."""


def check_tokenizer(config: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError where the tokenizer has ids for which the model has no embedding."""
    beyond = range(config.vocab_size, tokenizer.vocab_size)
    if not set(beyond) <= set(tokenizer.special_ids.values()):  # tokens for a padding that the model has never seen are never written by a text
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model's vocabulary {config.vocab_size} rows: "
            "they do not belong together, so put the model's own tokenizer beside it"
        )


def tokenizer_in(directory: Path) -> Path | None:
    """Returns the directory if it holds a tokenizer, else None."""
    return directory if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer.bytes")) else None


class Tensors(Protocol):
    """The tensors of a file format, by name."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class MappedSource(Source):
    """A source whose parameters are made of named tensors."""

    mapping: dict[str, Mapped]
    tensors: Tensors

    @classmethod
    def make(cls, path: Path, config: LlamaConfig, context_length: int | None, tokenizer_path: Path | None, mapping: dict[str, Mapped],
             tensors: Tensors, ignored: tuple[str, ...] = ()) -> "MappedSource":  # fmt: skip
        """Makes a source. Raises UserError naming the first tensor that is missing, that has another shape than the config says, or that is
        neither one of the mapping's nor `ignored` (by the end of its name)."""
        wanted = tensor_shapes(mapping)
        for name, shape in wanted.items():
            if name not in tensors.shapes:
                raise UserError(f"{path} lacks the tensor {name}: its config asks for it, so take a complete copy of the model")
            if (found := tensors.shapes[name]) != shape:
                raise UserError(
                    f"{name} in {path} is {_text(found)} and its config asks for {_text(shape)}: use the config of these weights"
                )
        for name in tensors.shapes:
            if name not in wanted and not name.endswith(ignored):
                raise UserError(f"{path} has the tensor {name}, which a Llama of its config has not: only plain Llamas are read")
        own = tensor_dtypes(mapping, None)
        for name in wanted:
            if (tensors.dtypes[name] == FP8) != (own[name] == FP8):
                raise UserError(
                    f"{name} in {path} is stored as {tensors.dtypes[name]} and its config says otherwise: only FP8 of the kind fbgemm_fp8 is "
                    "read, so use the config of these weights, or take an unquantized copy"
                )
        dtype = np.result_type(*{tensors.dtypes[name] for name in wanted if own[name] is None})
        return cls(path, config, dtype, context_length, tokenizer_path, mapping, tensors)

    def read(self, name, layer=None, index=None):
        mapped = self.mapping[name]
        shape, pieces = mapped.declaration.shape, mapped.pieces
        index = index or (slice(None),) * len(shape)
        parts = [piece.to_ours(functools.partial(self.tensors.read, piece.tensor.format(layer=layer)), index) for piece in pieces]
        if len(parts) == 1:
            return parts[0]
        shape = [*parts[0].shape]
        shape[mapped.dim] = sum(part.shape[mapped.dim] for part in parts)
        in_file_order = np.empty([shape[dim] for dim in pieces[0].inverse], np.result_type(*parts))  # which is fast to fill
        return np.concatenate(parts, mapped.dim, out=in_file_order.transpose(pieces[0].order))


def parse_json(path: Path, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns what `parse` makes of a JSON file. Raises UserError where the file is damaged or lacks a field."""
    try:
        return parse(json.loads(path.read_bytes()))
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]}: take a complete copy of the model") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the description of a model: copy it again") from error


def refuse_unknown(values: Mapping[str, Any], known: Collection[str], beginnings: tuple[str, ...], path: Path, prefix: str = "") -> None:
    """Raises UserError naming the first field that is neither `known` nor has one of the `beginnings`, and says something: not null, false, 0 or
    empty. It may change what the model computes."""
    for name, value in values.items():
        if value and name not in known and not name.startswith(beginnings):
            raise UserError(
                f"{path} has {prefix}{name} {json.dumps(value, default=str):.80}, of which it is not known here whether it changes what the model "
                "computes: remove the field if it does not"
            )


def _text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
