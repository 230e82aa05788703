"""The weights of any known format as those that a training run begins with."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.interop.formats.workdir import CheckpointSource, read_state
from herd_jax.interop.load import load_params, open_source
from herd_jax.interop.source import Source
from herd_jax.models.config import ModelConfig
from herd_jax.reliability.workdir import CHECKPOINTS
from herd_jax.text.tokenizer import Tokenizer
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

    def load_state(self, steps: Steps, seed: int) -> State:
        if self.moments:
            state = read_state(self.source.directory.parent, steps.plan)
            return state._replace(step=jax.device_put(np.int32(0), state.step.sharding))
        return steps.plan.init(seed)._replace(params=load_params(self.source, steps.layout, steps.model.declared, jnp.float32))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        mine = self.source.tokenizer
        if mine is not None and mine.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"data.sources were made with another tokenizer than init_from {self.source.path} has: make them again with "
                f"python -m herd_jax.tokenize --tokenizer {self.source.tokenizer_path}"
            )


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
