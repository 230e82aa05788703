"""The reference's log-probabilities of responses: computed once, and kept by the content of the weights and of the ids, so that other runs, hosts
and lengths of rows find them, and nothing else does.

They are those of each token, so the masks and the loss, which choose among them and add them up, may change freely.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from herd_jax.data.preferences import Preference
from herd_jax.errors import UserError
from herd_jax.files import user_path, whole_file, write_whole
from herd_jax.interop.formats.mapping import parameters
from herd_jax.interop.formats.workdir import CheckpointSource
from herd_jax.interop.load import open_source
from herd_jax.interop.source import Source
from herd_jax.machines.agreement import tell_all
from herd_jax.model import load_source

NAME = "reference.txt"  # in the workdir: the content of the weights that the run began with


class Reference:
    """The model at `path`, whose log-probabilities lie in `cache`. A run that has begun keeps its reference, also where other weights lie at that
    path by now: `workdir` has what it was."""

    def __init__(self, path: str, cache: str, mesh: Mesh, workdir: Path) -> None:
        self._path, self._mesh, self._noted = path, mesh, workdir / NAME
        self._cache = user_path(cache)

    def log_probabilities(self, pairs: Sequence[Preference]) -> list[list[np.ndarray]]:
        """Returns, for each pair, the log-probability of each token of its responses, in nats, from the cache or computed. Raises UserError where
        the weights are no longer those that the run began with, and the cache has not all that is needed."""
        rows = [(pair.prompt, response.ids) for pair in pairs for response in pair.responses]
        content = self._content()
        keys = [key_of(content, *row) for row in rows]
        known = self._read(content)
        missing = sorted({key: i for i, key in enumerate(keys) if key not in known}.values())
        if len(set(tell_all(hashlib.sha256(repr(missing).encode()).hexdigest()))) > 1:  # hosts whose caches differ compute all, together
            missing = sorted({key: i for i, key in enumerate(keys)}.values())
        if missing:
            source = open_source(self._path)
            if content != content_of(source):
                raise UserError(
                    f"the reference {self._path} has other weights than when the run began, and {self._cache} has not all of its log-probabilities: bring the "
                    "weights back, or begin in another workdir"
                )
            model = load_source(source, self._mesh)
            computed = model.log_probabilities([rows[i][0] for i in missing], [rows[i][1] for i in missing])
            new = {keys[i]: log_p for i, log_p in zip(missing, computed, strict=True)}
            self._write(content, new)
            known |= new
        found = [known[key] for key in keys]
        return [found[2 * i : 2 * i + 2] for i in range(len(pairs))]

    def _content(self) -> str:
        """Returns the content of the weights that the run began with."""
        mine = ""
        if jax.process_index() == 0:
            if not self._noted.is_file():
                write_whole(self._noted, content_of(open_source(self._path)))
            mine = self._noted.read_text()
        return tell_all(mine)[0]

    def _read(self, content: str) -> dict[bytes, np.ndarray]:
        known = {}
        for file in sorted(self._cache.glob(f"{content[:32]}-*.npz")):
            with np.load(file) as part:
                keys, stops, values = part["keys"], part["stops"], part["values"]
            known |= {bytes(key): of_key for key, of_key in zip(keys, np.split(values, stops[:-1]), strict=True)}
        return known

    def _write(self, content: str, new: dict[bytes, np.ndarray]) -> None:
        if jax.process_index():
            return
        buffer = io.BytesIO()
        keys = np.array([np.frombuffer(key, np.uint8) for key in new])
        np.savez(buffer, keys=keys, stops=np.cumsum([len(log_p) for log_p in new.values()]), values=np.concatenate(list(new.values())).astype(np.float32))
        name = hashlib.sha256(b"".join(sorted(new))).hexdigest()[:16]
        path = self._cache / f"{content[:32]}-{name}.npz"
        with whole_file(path, shared=True) as file:
            file.write(buffer.getvalue())


def key_of(content: str, prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Returns what is the same for the same weights, prompt and response."""
    return hashlib.sha256(repr((content, list(prompt), list(response))).encode()).digest()


def content_of(source: Source) -> str:
    """Returns what is the same for the same weights, and other for any other: of a checkpoint its checksums, else a hash of every parameter."""
    digest = hashlib.sha256(repr(source.config).encode())
    if isinstance(source, CheckpointSource):
        digest.update(repr(sorted((name, value) for name, value in source.checksums.items() if name.startswith(".params"))).encode())
        return digest.hexdigest()
    for name, declaration in parameters(source.config).items():
        for layer in declaration.layers or [None]:
            digest.update(np.ascontiguousarray(source.read(name, layer)).view(np.uint8).data)
    return digest.hexdigest()
