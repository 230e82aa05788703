"""Opens a model of any known format, and reads its parameters straight into a mesh."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from herd_jax.errors import UserError
from herd_jax.files import refuse_pointer, user_path
from herd_jax.interop.formats import gguf, herd, huggingface, meta, workdir
from herd_jax.interop.source import Source
from herd_jax.models.params import Declaration, Layout, Stored, is_declaration, parameter_name
from herd_jax.reliability.workdir import CHECKPOINTS, STAGES
from herd_jax.text.gguf_tokenizer import GGUF_MAGIC

PyTree = Any


def open_source(path: str | Path) -> Source:
    """Opens the model at `path`, whose format is found out: a Hugging Face, Meta or herd directory, a GGUF file or the directory of one, the
    workdir of a training run, or one of its checkpoints. Raises UserError for what is none of them, or is damaged."""
    path = user_path(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
                return gguf.open_gguf(path)
        refuse_pointer(path)
        raise UserError(f"{path} is no GGUF file: name one, or the directory of a model")
    if not path.is_dir():
        raise UserError(f"{path} does not exist: name the directory of a model, or a GGUF file")
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 and not list(path.glob("*.safetensors*")) and not (path / meta.CONFIG_FILE).exists():  # a config.json may lie beside it
        return gguf.open_gguf(ggufs[0])
    for sign, opener in (
        (herd.CONFIG_FILE, herd.open_herd),
        (huggingface.CONFIG_FILE, huggingface.open_huggingface),
        (meta.CONFIG_FILE, meta.open_meta),
        (CHECKPOINTS, workdir.open_workdir),
        (workdir.RECORD, workdir.open_checkpoint),
        (STAGES, workdir.open_stages),
    ):
        if (path / sign).exists():
            return opener(path)
    if ggufs:
        raise UserError(f"{path} holds {len(ggufs)} GGUF files: name one of them")
    signs = "config.json (Hugging Face), params.json (Meta), herd.json, checkpoints (a training run) or a GGUF file"
    raise UserError(f"{path} holds no model: one has {signs}; name another directory")


def load_params(source: Source, layout: Layout, declared: PyTree, dtype) -> PyTree:
    """Returns the parameters of `declared` as `layout` stores them, on its mesh and cast to `dtype` (or their own)."""
    place = lambda path, d: load_array(source, parameter_name(path), d, layout.mesh, layout.stored(d), dtype)
    return jax.tree_util.tree_map_with_path(place, declared, is_leaf=is_declaration)


def load_array(source: Source, name: str, declaration: Declaration, mesh: Mesh, stored: Stored, dtype) -> jax.Array:
    """Returns a parameter as `stored` says, cast to `dtype` (or its own). Raises UserError where the source is gone by now, or damaged.

    Each process reads only what its own devices hold, and its memory holds one device's share at a time.
    """
    own = declaration.dtype or dtype

    def share(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [range(size)[part] for part, size in zip(index, stored.shape)]
        try:
            if stored.layers is None:
                return _read_layers(source, name, [None], bounds, declaration.shape, own)[0]
            return _read_layers(source, name, stored.layers[index[0]], bounds[1:], declaration.shape, own)
        except OSError as error:
            raise UserError(f"{source.path} can no longer be read ({error.strerror or error}): load the model again from where it is now") from error

    return jax.make_array_from_callback(stored.shape, NamedSharding(mesh, stored.spec), share, dtype=own)


def _read_layers(source: Source, name: str, layers: Sequence, bounds: list[range], shape: tuple[int, ...], dtype) -> np.ndarray:
    """Returns layers of a parameter of `shape`, stacked, within `bounds`; zero where a slot has no layer (-1) and beyond the shape."""
    index = tuple(slice(min(part.start, size), min(part.stop, size)) for part, size in zip(bounds, shape))
    filled = tuple(slice(part.stop - part.start) for part in index)
    sizes, stack = [len(part) for part in bounds], None
    for slot, layer in enumerate(layers):
        if (layer is None or layer >= 0) and all(part.start < part.stop for part in index):
            values = source.read(name, layer, index)
            stack = _zeros_like(values, len(layers), sizes, dtype) if stack is None else stack
            stack[slot][filled] = values
    return np.zeros((len(layers), *sizes), dtype) if stack is None else stack


def _zeros_like(values: np.ndarray, num_layers: int, sizes: list[int], dtype) -> np.ndarray:
    """Returns zeros [num_layers, *sizes], with a layer's dims in memory in the order of those of `values`: jax transposes fast on the way to a
    device, numpy slowly."""
    order = np.argsort([-stride for stride in values.strides], kind="stable")
    return np.zeros((num_layers, *(sizes[dim] for dim in order)), dtype).transpose(0, *(1 + np.argsort(order)))
