"""The weights of any known format as those that a training run begins with."""

import dataclasses

import jax.numpy as jnp

from herd_jax.errors import UserError
from herd_jax.interop.load import load_params, open_source
from herd_jax.interop.source import Source
from herd_jax.models.config import ModelConfig
from herd_jax.text.tokenizer import Tokenizer
from herd_jax.training.state import State
from herd_jax.training.step import Steps


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    source: Source

    @classmethod
    def open(cls, path: str) -> "InitialWeights":
        """Opens the model at `path`. Raises UserError as `open_source` does, and for a quantized model."""
        source = open_source(path)
        if source.config.fp8:
            raise UserError(f"init_from {path} is quantized to FP8, and such weights are not trained: give the model that it was made from")
        return cls(source)

    @property
    def model_config(self) -> ModelConfig:
        """Returns every dimension of the source, so that a run's config does not depend on a name."""
        dimensions = {field.name for field in dataclasses.fields(ModelConfig)} - {"name"}
        return ModelConfig(**{name: getattr(self.source.config, name) for name in dimensions})

    def load_state(self, steps: Steps, seed: int) -> State:
        return steps.plan.init(seed)._replace(params=load_params(self.source, steps.layout, steps.model.declared, jnp.float32))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        mine = self.source.tokenizer
        if mine is not None and mine.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"data.sources were made with another tokenizer than init_from {self.source.path} has: make them again with "
                f"python -m herd_jax.tokenize --tokenizer {self.source.tokenizer_path}"
            )
