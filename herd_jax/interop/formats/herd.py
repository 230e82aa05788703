"""The project's own format: herd.json with the model's config, safetensors that hold every layer of every parameter as declared, and the
tokenizer's files. No framework is needed to read it, and a device's share of a parameter is a slice of a mapped tensor.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from herd_jax.config import parse, to_dict
from herd_jax.interop.formats.mapping import Mapped, Piece, parameters, tensor_dtypes, tensor_shapes
from herd_jax.interop.formats.safetensors import SafetensorsFiles, files_of, write_safetensors
from herd_jax.interop.source import MappedSource, Source, parse_json, tokenizer_in
from herd_jax.models.config import LlamaConfig
from herd_jax.text.tokenizer import Tokenizer

CONFIG_FILE = "herd.json"


def map_parameters(config: LlamaConfig) -> dict[str, Mapped]:
    def whole(name: str, shape: tuple[int, ...]) -> Piece:
        return Piece(name, shape, shape, tuple(range(len(shape))))

    return {name: Mapped(d, (whole(f"{name}.{{layer}}" if d.layers else name, d.shape),)) for name, d in parameters(config).items()}


def open_herd(directory: Path) -> Source:
    """Opens a directory of this format. Raises UserError for damaged files, and for tensors that do not fit the config."""
    path = directory / CONFIG_FILE
    parse_values = lambda values: (parse(LlamaConfig, values["model"], "model"), values["context_length"])
    config, context_length = parse_json(path, parse_values)
    tensors = SafetensorsFiles(files_of(directory))
    return MappedSource.make(directory, config, context_length, tokenizer_in(directory / "tokenizer"), map_parameters(config), tensors)


def write(directory: Path, config: LlamaConfig, dtype: np.dtype, arrays: Iterable[np.ndarray], tokenizer: Tokenizer | None,
          context_length: int) -> None:  # fmt: skip
    if tokenizer:
        tokenizer.save(directory / "tokenizer")
    mapping = map_parameters(config)
    write_safetensors(directory, tensor_shapes(mapping), tensor_dtypes(mapping, dtype), arrays)
    values = {"model": to_dict(config), "context_length": context_length}
    (directory / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")
