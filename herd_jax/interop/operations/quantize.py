"""Quantizes the matrices of a model's feed-forward to FP8, as they are read."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from herd_jax.errors import UserError
from herd_jax.interop.load import open_source
from herd_jax.interop.save import save
from herd_jax.interop.source import Source
from herd_jax.models.fp8 import Fp8Config, quantize_rowwise

_TO_ROWS = {"layers.gate_up": (1, 2, 0), "layers.down": (1, 0)}  # [out, in], the order of our dims


def quantize(source: str, target: str, to: str = "herd") -> None:
    """Writes the model at `source` with an FP8 feed-forward in all layers but the first and the last (section 6.2 of the paper) to the new
    directory `target`, all else as it is. Raises UserError as `open_source`, `save` and `QuantizedSource.make` do."""
    model = QuantizedSource.make(open_source(source))
    save(target, to, model.config, model.read, model.dtype, model.tokenizer, model.context_length)


@dataclasses.dataclass(frozen=True)
class QuantizedSource(Source):
    """The model `plain`, quantized as it is read. Memory holds one matrix at a time."""

    plain: Source

    @classmethod
    def make(cls, plain: Source, fp8: Fp8Config = Fp8Config()) -> "QuantizedSource":
        """Returns `plain`, to be quantized. Raises UserError for a model that is quantized already, or has no layer to quantize."""
        if plain.config.fp8:
            raise UserError(f"{plain.path} is quantized to FP8 already: give the model that it was made from")
        config = dataclasses.replace(plain.config, fp8=fp8)
        return cls(plain.path, config, plain.dtype, plain.context_length, plain.tokenizer_path, plain)

    def read(self, name, layer=None, index=None):
        """Reads as `Source.read` does. Raises UserError, too, where a value of a matrix is not finite."""
        matrix, _, part = name.rpartition("_")
        if part not in ("fp8", "scales"):
            return self.plain.read(name, layer, index)
        rows = self.plain.read(matrix, layer).transpose(_TO_ROWS[matrix])
        values, scales = quantize_rowwise(jnp.asarray(rows.reshape(-1, rows.shape[-1])))
        if not np.isfinite(scales).all():
            raise UserError(f"{matrix} of layer {layer} in {self.path} is not finite: the model is damaged, so take another copy")
        array = np.asarray(values).reshape(rows.shape) if part == "fp8" else np.asarray(scales).reshape(rows.shape[:-1])
        return array if index is None else array[index]
