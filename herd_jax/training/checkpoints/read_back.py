"""What a checkpoint must show before it counts as saved: its record and the index of its arrays are read back, before older ones are deleted.

That says that a restore finds every array and every chunk of it. What is in the chunks is compared with checksums when it is restored.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore

from herd_jax.training.checkpoints.checksums import sealed


def require_readable(directory: Path, private: bool = False) -> None:
    """Raises OSError where what was just written into a checkpoint's `directory` could not be restored.

    A `private` one has the chunks of one process, and which those are is not looked at.
    """
    try:
        stored = json.loads((directory / "record" / "metadata").read_text(encoding="utf-8"))
        if sealed(stored["record"]) != stored:
            raise ValueError("its record is not the one that was written")
        _require_arrays(directory / "state", stored["record"]["leaves"], private)
    except (ValueError, KeyError, OSError) as error:
        raise OSError(f"it cannot be read back: {error}") from error


def _require_arrays(directory: Path, leaves: dict[str, str], private: bool) -> None:
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}).result()
    keys = set(store.list().result())
    names = {key.removesuffix(b"/.zarray") for key in keys if key.endswith(b"/.zarray")}
    arrays = {name: json.loads(store.read(name + b"/.zarray").result().value) for name in names}
    found = sorted(_type_text(array) for array in arrays.values())
    if found != sorted(leaves.values()):
        raise ValueError(f"it has {len(found)} arrays of other types or shapes than the {len(leaves)} that were saved")
    for name, array in arrays.items() if not private else ():
        missing = next((chunk for chunk in _chunks(array) if name + b"/" + chunk not in keys), None)
        if missing is not None:
            raise ValueError(f"chunk {missing.decode()} of {name.decode()} is missing")


def _type_text(array: dict) -> str:
    """Returns the type as `checksums.leaf_types` writes it; zarr writes what numpy knows as "<f4", what only jax knows as "bfloat16"."""
    dtype = array["dtype"]
    return f"{dtype if dtype.isalnum() else np.dtype(dtype)}{array['shape']}"


def _chunks(array: dict) -> Iterator[bytes]:
    counts = [math.ceil(size / chunk) for size, chunk in zip(array["shape"], array["chunks"], strict=True)]
    return (b".".join(b"%d" % index for index in place) or b"0" for place in itertools.product(*map(range, counts)))
