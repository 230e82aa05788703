"""Writes a model as a directory, one tensor at a time. It is written under another name first, so a directory that is there is complete.

Several processes write together, each of them whole files: `target` lies on a file system that all of them share.
"""

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from herd_jax.errors import UserError
from herd_jax.files import unfinished, user_path, whole_directory
from herd_jax.interop.formats import herd, huggingface, meta
from herd_jax.interop.formats.mapping import Mapped, parameters, walk
from herd_jax.interop.load import open_source
from herd_jax.interop.mesh_reader import MeshReader
from herd_jax.interop.source import Export, check_tokenizer
from herd_jax.machines.agreement import all_or_none, tell_all
from herd_jax.models.config import LlamaConfig
from herd_jax.reliability.lock import only_writer
from herd_jax.text.tokenizer import Tokenizer

FORMATS = {"herd": herd, "huggingface": huggingface, "meta": meta}
PATIENCE_SECONDS = 30  # until a file that one host made is seen on another

Read = Callable[[str, int | None], np.ndarray]  # as Source.read


def convert(source: str, target: str, to: str = "herd", dtype: str | None = None, tp: int = 1) -> None:
    """Writes the model at `source` to the new directory `target`, in its own dtype or another. Raises UserError as `open_source` and
    `save` do."""
    model = open_source(source)
    save(target, to, model.config, model.read, dtype or model.dtype, model.tokenizer, model.context_length, tp)


def save(target: str | Path, to: str, config: LlamaConfig, read: Read | MeshReader, dtype, tokenizer: Tokenizer | None = None,
         context_length: int | None = None, tp: int = 1) -> None:  # fmt: skip
    """Writes a model to the new directory `target` in the format `to` (of FORMATS), its weights in `dtype`. All processes make this call.

    `read(name, layer)` gives a parameter as `Source.read` does: by its path in the declaration, in its declared shape, one layer of it.
    `tp`: for how many ranks of tensor parallelism Meta's format has a file each. Raises UserError, in all processes, where the target exists or
    cannot be written, or where the format cannot say what the model is.
    """
    target = user_path(target).absolute()
    if to not in FORMATS:
        raise UserError(f"--to is '{to}': it must be one of {', '.join(FORMATS)}")
    if tokenizer:
        check_tokenizer(config, tokenizer)
    if context_length is None:  # that of Llama 3.1 and later, and of Llama 3
        context_length = 131_072 if config.rope_scaling else 8192
    export = Export(config, np.dtype(dtype), tokenizer, context_length, tp)
    mapping = FORMATS[to].map_parameters(config)
    with _complete_or_absent(target) as directory, _progress(target.name, sum(d.size for d in parameters(config).values())) as advance:
        arrays = _Arrays(mapping, read, export.dtype, advance)
        try:
            if jax.process_index() == 0:
                FORMATS[to].describe(directory, export)
            FORMATS[to].write(directory, export, arrays)
        finally:
            arrays.finish()


class _Arrays:
    """The tensors of a model in the order of `tensor_shapes`."""

    def __init__(self, mapping: dict[str, Mapped], read: Read | MeshReader, dtype: np.dtype, advance: Callable[[int], None]):
        self._mapping, self._read, self._dtype, self._advance = mapping, read, dtype, advance
        self._left = walk(mapping)

    def __call__(self, wanted: set[str]) -> Iterator[np.ndarray]:
        """Yields the tensors of these names."""
        for name, layer in self._left:
            mapped = self._mapping[name]
            names, dtype = [piece.tensor.format(layer=layer) for piece in mapped.pieces], mapped.declaration.dtype or self._dtype
            if wanted.isdisjoint(names):
                self._take_part(name, layer)
            else:
                for piece, tensor, part in zip(mapped.pieces, names, mapped.split(self._read(name, layer)), strict=True):
                    if tensor in wanted:
                        yield piece.to_file(part.astype(dtype, copy=False))
            self._advance(math.prod(mapped.declaration.shape))

    def finish(self) -> None:
        """Takes part in the reading of what this process does not write, and others may."""
        for name, layer in self._left:
            self._take_part(name, layer)

    def _take_part(self, name: str, layer: int | None) -> None:
        if isinstance(self._read, MeshReader):
            self._read.take_part(name, layer)


@contextlib.contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """Does what `whole_directory` does, for all processes together. Raises UserError in all of them where the target exists, or one of them cannot
    write, such as on a full disk."""
    with all_or_none(), _in_words(target), contextlib.ExitStack() as stack:
        with all_or_none(), _in_words(target):
            if jax.process_index() == 0:
                if target.exists():
                    raise UserError(f"{target} exists: name a new directory, or remove it")
                stack.enter_context(only_writer(target.parent, f".{target.name}.lock"))
                stack.enter_context(whole_directory(target))
        directory = unfinished(target)
        if jax.process_count() > 1:
            _check_shared(directory)
        with all_or_none(), _in_words(target):
            yield directory


@contextlib.contextmanager
def _in_words(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {target} ({error.strerror or error}): mend that and give the same command again") from error


def _check_shared(directory: Path) -> None:
    """Raises UserError in all processes where one does not see what the first one writes."""
    mark = directory / tell_all(uuid.uuid4().hex)[0]
    with all_or_none():
        if jax.process_index() == 0:
            mark.touch()
    with all_or_none():
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not mark.exists():
            if time.monotonic() > give_up:
                raise UserError(f"{directory.parent} is not the same directory on all hosts: name one on a file system that all of them share")
            time.sleep(0.1)
    if jax.process_index() == 0:
        mark.unlink()


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress line on the terminal; yields a function that advances it by a number of parameters."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal or jax.process_index() > 0) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number: progress.advance(task, number)
