"""A model that is evaluated and the directory of what is found of it: opened once, by the command, and handed to what measures."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from herd_jax.errors import UserError
from herd_jax.evaluation.results import OF_SEVERAL, check_writable, read_results, write_items, write_results
from herd_jax.files import user_path
from herd_jax.mesh import MeshConfig
from herd_jax.model import Model, load


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The model at `path` and where its results go: `output` is what --output says, `mesh` and `dtype` are those of `load`."""

    path: str | Path
    output: str | Path | None = None
    mesh: MeshConfig | None = None
    dtype: str | None = None

    @functools.cached_property
    def model(self) -> Model:
        """Returns the model, read when it is first asked for. Raises UserError as `load`, and for a reward model."""
        model = load(self.path, self.mesh, self.dtype)
        model.check_language()
        return model

    @property
    def directory(self) -> Path:
        """Returns what --output says, else `evaluation/<last part of the model's path>`."""
        return user_path(self.output) if self.output else Path("evaluation") / user_path(self.path).resolve().name

    def check_directory(self) -> None:
        """Makes the directory where there is none: called before hours of computing. Raises UserError where no file can be written into it,
        and where it holds results of another model, whose items would be taken for this one's."""
        check_writable(self.directory)
        for record in read_results(self.directory).values():
            if record["command"] not in OF_SEVERAL and user_path(record["model"]).resolve() != user_path(self.path).resolve():
                raise UserError(f"{self.directory} holds results of another model, {record['model']}: give another --output")

    def write(self, command: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> Path:
        """Writes results as `write_results` does."""
        return write_results(self.directory, command, self.path, settings, results)

    def write_items(self, task: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes items as `write_items` of the results does."""
        return write_items(self.directory, task, rows)
