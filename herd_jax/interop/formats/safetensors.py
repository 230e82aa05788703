"""The safetensors format: tensors read lazily out of mapped files, and written one at a time, so that memory holds one of them.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, begin and end in what follows) and
the tensors' bytes. The package `safetensors` reads no bfloat16 into numpy and writes only what is in memory as a whole.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from herd_jax.errors import UserError
from herd_jax.files import refuse_pointer
from herd_jax.interop.formats.mapping import tensor_bytes
from herd_jax.interop.source import Arrays

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
WRITE_BYTES = 2**24  # bytes written at a time: whole tensors at once are written at half the speed


class SafetensorsFiles:
    """The tensors of one or several files: `shapes` and `dtypes` by name."""

    def __init__(self, paths: Iterable[Path]):
        """Reads the headers. Raises UserError where a file is absent, truncated or damaged, or holds what is not floating point."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in paths:
            for name, dtype, shape, offset in _read_header(path):
                self.shapes[name], self.dtypes[name], self._places[name] = shape, dtype, (path, offset)

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the tensor, or the part that `slices` take, mapped: its bytes are read as they are used, and freed with the array."""
        path, offset = self._places[name]
        return np.memmap(path, self.dtypes[name], "r", offset, self.shapes[name])[slices]


def _read_header(path: Path) -> Iterator[tuple[str, np.dtype, tuple[int, ...], int]]:
    """Yields (name, dtype, shape, offset in the file) of each tensor."""
    if not path.is_file():
        why = ", which its index names" if (path.parent / INDEX_FILE).is_file() else " and has no index of several files"
        raise UserError(f"{path.parent} lacks {path.name}{why}: copy that file too")
    refuse_pointer(path)
    damaged = f"{path} is truncated or no safetensors file: copy it again"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise UserError(damaged)
        try:
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(damaged) from error
    for name, dtype, shape, begin, end in entries:
        if dtype not in DTYPES:
            remedy = "save it again in one of them" if dtype in ("F64", "C64") else "take an unquantized copy of the model"
            raise UserError(f"{name} in {path} is stored as {dtype}: only {', '.join(DTYPES)} are read, so {remedy}")
        if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize or not 0 <= begin <= end <= size - start:
            raise UserError(damaged)
        yield name, np.dtype(DTYPES[dtype]), shape, start + begin


def write_safetensors(directory: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, np.dtype], arrays: Arrays) -> None:
    """Writes the tensors, of `shapes` and `dtypes` and in their order, as `model.safetensors`, or as several files and their index where one
    would be larger than 5 GB. Of several processes each writes every so manieth file, and the first one the index."""
    sizes = tensor_bytes(shapes, dtypes)
    files: list[list[str]] = [[]]
    for name in shapes:
        if files[-1] and sum(map(sizes.get, files[-1])) + sizes[name] > MAX_FILE_BYTES:
            files.append([])
        files[-1].append(name)
    names = ["model.safetensors"] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    own = slice(jax.process_index(), None, jax.process_count())
    ours = arrays({name for tensors in files[own] for name in tensors})
    for file_name, tensors in zip(names[own], files[own]):
        _write_file(directory / file_name, {name: shapes[name] for name in tensors}, dtypes, ours)
    if len(files) > 1 and jax.process_index() == 0:
        weight_map = {name: file_name for file_name, tensors in zip(names, files) for name in tensors}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, np.dtype], arrays: Iterator[np.ndarray]) -> None:
    code = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    sizes = tensor_bytes(shapes, dtypes)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + sizes[name]
        header[name] = {"dtype": code[dtypes[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), array in zip(shapes.items(), arrays):
            assert array.shape == shape and array.dtype == dtypes[name], (name, array.shape, shape, array.dtype)
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for start in range(0, flat.size, WRITE_BYTES):
                file.write(flat[start : start + WRITE_BYTES])


def files_of(directory: Path) -> list[Path]:
    """Returns the safetensors files of a directory: the only one where it is there, as transformers does, else those of the index."""
    index, only = directory / INDEX_FILE, directory / "model.safetensors"
    if only.is_file() or not index.is_file():
        return [only]
    try:
        return [directory / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors files: copy it again") from error
