"""The project's own format: herd.json with the model's config, safetensors that hold every layer of every parameter as declared, and the
tokenizer's files. No framework is needed to read it, and a device's share of a parameter is a slice of a mapped tensor.
"""

import json
from pathlib import Path

from herd_jax.config import parse, to_dict
from herd_jax.interop.formats.mapping import Mapped, Piece, parameters, tensor_dtypes, tensor_shapes
from herd_jax.interop.formats.safetensors import SafetensorsFiles, files_of, write_safetensors
from herd_jax.interop.source import Arrays, Export, MappedSource, Source, parse_json, tokenizer_in
from herd_jax.models.config import LlamaConfig

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


def describe(directory: Path, export: Export) -> None:
    """Writes all but the weights."""
    if export.tokenizer:
        export.tokenizer.save(directory / "tokenizer")
    values = {"model": to_dict(export.config), "context_length": export.context_length}
    (directory / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


def write(directory: Path, export: Export, arrays: Arrays) -> None:
    """Writes this process's files of weights."""
    mapping = map_parameters(export.config)
    write_safetensors(directory, tensor_shapes(mapping), tensor_dtypes(mapping, export.dtype), arrays)
