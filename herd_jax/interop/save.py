"""Writes a model as a directory, one tensor at a time. It is written under another name first, so a directory that is there is complete."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from herd_jax.errors import UserError
from herd_jax.files import user_path, whole_directory
from herd_jax.interop.formats import herd, huggingface, meta
from herd_jax.interop.formats.mapping import Mapped, parameter_name, tensor_bytes, tensor_dtypes, tensor_shapes, walk
from herd_jax.interop.load import open_source
from herd_jax.interop.source import check_tokenizer
from herd_jax.models.config import LlamaConfig
from herd_jax.models.params import Layout, is_declaration
from herd_jax.reliability.lock import only_writer
from herd_jax.text.tokenizer import Tokenizer

FORMATS = {"herd": herd, "huggingface": huggingface, "meta": meta}

PyTree = Any
Read = Callable[[str, int | None], np.ndarray]  # as Source.read


def convert(source: str, target: str, to: str = "herd", dtype: str | None = None) -> None:
    """Writes the model at `source` to the new directory `target`, in its own dtype or another. Raises UserError as `open_source` and
    `save` do."""
    model = open_source(source)
    save(target, to, model.config, model.read, dtype or model.dtype, model.tokenizer, model.context_length)


def save(target: str | Path, to: str, config: LlamaConfig, read: Read, dtype, tokenizer: Tokenizer | None = None,
         context_length: int | None = None) -> None:  # fmt: skip
    """Writes a model to the new directory `target` in the format `to` (of FORMATS), its weights in `dtype`.

    `read(name, layer)` gives a parameter as `Source.read` does: by its path in the declaration, in its declared shape, one layer of it.
    Raises UserError where the target exists or cannot be written, or where the format cannot say what the model is.
    """
    target = user_path(target).absolute()
    if to not in FORMATS:
        raise UserError(f"--to is '{to}': it must be one of {', '.join(FORMATS)}")
    if target.exists():
        raise UserError(f"{target} exists: name a new directory, or remove it")
    if tokenizer:
        check_tokenizer(config, tokenizer)
    if context_length is None:  # that of Llama 3.1 and later, and of Llama 3
        context_length = 131_072 if config.rope_scaling else 8192
    dtype, mapping = np.dtype(dtype), FORMATS[to].map_parameters(config)
    sizes = tensor_bytes(tensor_shapes(mapping), tensor_dtypes(mapping, dtype))
    with _complete_or_absent(target) as directory, _progress(target.name, sum(sizes.values())) as advance:
        arrays = _arrays(mapping, read, dtype, advance)
        FORMATS[to].write(directory, config, dtype, arrays, tokenizer, context_length)


def reader(layout: Layout, declared: PyTree, params: PyTree) -> Read:
    """Returns a `read` of the parameters of `declared` that lie on a mesh as `layout` stores them, all of it on this process's devices."""
    named = lambda tree: {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_declaration)}
    declarations, stored = named(declared), named(params)

    def read(name: str, layer: int | None = None) -> np.ndarray:
        array, slot = stored[name], None if layer is None else layout.slots(declarations[name]).tolist().index(layer)
        assert array.is_fully_addressable
        whole = np.empty(array.shape if slot is None else array.shape[1:], array.dtype)
        for shard in array.addressable_shards:  # put together on the host: gathering on the devices would cost each of them the memory
            data, place = shard.data, shard.index
            if slot is not None:
                first, last, _ = place[0].indices(len(array))
                if not first <= slot < last:
                    continue
                data, place = jax.lax.dynamic_index_in_dim(data, slot - first, keepdims=False), place[1:]
            if shard.replica_id == 0:
                whole[place] = data
        return whole[tuple(map(slice, declarations[name].shape))]

    return read


def _arrays(mapping: dict[str, Mapped], read: Read, dtype: np.dtype, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Yields the tensors of a file in the order of `tensor_shapes`."""
    for name, layer in walk(mapping):
        for piece, part in zip(mapping[name].pieces, mapping[name].split(read(name, layer))):
            array = piece.to_file(part.astype(mapping[name].declaration.dtype or dtype, copy=False))
            yield array
            advance(array.nbytes)


@contextlib.contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """Does what `whole_directory` does; raises UserError where the model cannot be written, such as on a full disk."""
    try:
        with only_writer(target.parent, f".{target.name}.lock"), whole_directory(target) as directory:
            yield directory
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror or error}): mend that and give the same command again") from error


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress line on the terminal; yields a function that advances it by a number of bytes."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
