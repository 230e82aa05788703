"""The weights of any known format as those that a training run begins with."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.interop.formats.mapping import parameters
from herd_jax.interop.formats.workdir import CheckpointSource, read_state
from herd_jax.interop.load import load_array, open_source
from herd_jax.interop.source import Source
from herd_jax.models.config import ModelConfig
from herd_jax.models.params import is_declaration, parameter_name
from herd_jax.reliability.workdir import CHECKPOINTS, stage_directories
from herd_jax.text.tokenizer import Tokenizer
from herd_jax.training.checkpoints.checkpoint import Checkpointer
from herd_jax.training.config import RunConfig
from herd_jax.training.resume import parse_saved
from herd_jax.training.state import State
from herd_jax.training.step import Steps


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The weights of a model, and with `moments` the optimizer's state of the checkpoint that it is; a run takes them at its own step 0."""

    source: Source
    moments: bool = False

    @classmethod
    def open(cls, path: str, moments: bool = False) -> "InitialWeights":
        """Opens the model at `path`, also WORKDIR@STEP. Raises UserError as `open_source` does, for a quantized model, and for `moments` of
        what is no checkpoint of a training run."""
        source = open_source(_checkpoint_of_step(path))
        if moments and not isinstance(source, CheckpointSource):
            raise UserError(f"init_moments is true and init_from {path} is no checkpoint of a training run, which alone has moments: leave it out")
        if source.config.fp8:
            raise UserError(f"init_from {path} is quantized to FP8, and such weights are not trained: give the model that it was made from")
        return cls(source, moments)

    @property
    def model_config(self) -> ModelConfig:
        """Returns every dimension of the source, so that a run's config does not depend on a name."""
        dimensions = {field.name for field in dataclasses.fields(ModelConfig)} - {"name"}
        return ModelConfig(**{name: getattr(self.source.config, name) for name in dimensions})

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def context_length(self) -> int | None:
        return self.source.context_length

    def load_state(self, steps: Steps, seed: int) -> State:
        if self.moments:
            return steps.plan.at_its_beginning(read_state(self.source.directory.parent, steps.plan))
        fresh, known = steps.plan.init(seed), parameters(self.source.config)
        own = lambda path, d, new: load_array(self.source, parameter_name(path), d, steps.layout.mesh, steps.layout.stored(d), jnp.float32)
        load = lambda path, d, new: own(path, d, new) if parameter_name(path) in known else new  # a new head begins at random
        return fresh._replace(params=jax.tree_util.tree_map_with_path(load, steps.model.declared, fresh.params, is_leaf=is_declaration))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        mine = self.source.tokenizer
        if mine is not None and mine.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"data.sources were made with another tokenizer than init_from {self.source.path} has: make them again with "
                f"python -m herd_jax.tokenize --tokenizer {self.source.tokenizer_path}"
            )


def initial_weights(config: RunConfig) -> tuple[RunConfig, InitialWeights | None]:
    """Returns the config with the dimensions of its `init_from`, and the weights.

    Of a run that has begun, its own checkpoint has all that is needed: where `init_from` is gone, such as a checkpoint that another run gave up
    since, the weights are None and the dimensions those of the checkpoint. Raises UserError as `InitialWeights.open` does.
    """
    if not config.init_from:
        return config, None
    try:
        initial = InitialWeights.open(config.init_from, config.init_moments)
    except UserError as error:
        saved = _begun(config)
        if saved is None:
            raise
        print(f"note: {error}; the run has begun, and goes on without it", file=sys.stderr, flush=True)
        return dataclasses.replace(config, model=saved.model), None
    return dataclasses.replace(config, model=initial.model_config), initial


def _begun(config: RunConfig) -> RunConfig | None:
    """Returns the config that the run's own newest checkpoint (of its first stage) keeps, if it began with the same `init_from`."""
    directory = (stage_directories(config.directory) or [config.directory])[0]
    newest = Checkpointer(directory / CHECKPOINTS, keep=1).newest() if (directory / CHECKPOINTS).is_dir() else None
    saved = newest and parse_saved(newest[1]["config"], type(config))
    return saved if saved and saved.init_from == config.init_from else None


def _checkpoint_of_step(path: str) -> Path:
    """Returns the path of the checkpoint that WORKDIR@STEP means; a path that exists is taken as it is."""
    at_step = re.fullmatch(r"(.+)@(\d+)", str(path))
    if user_path(path).exists() or not at_step:
        return user_path(path)
    checkpoint = user_path(at_step[1]) / CHECKPOINTS / at_step[2]
    if not checkpoint.is_dir():
        kept = sorted((int(step.name) for step in checkpoint.parent.glob("[0-9]*") if step.name.isdigit()), reverse=True)
        have = f"has checkpoints of steps {', '.join(map(str, kept))}" if kept else "has no checkpoints"
        raise UserError(f"init_from {path}: {at_step[1]} {have}: name one of them")
    return checkpoint
