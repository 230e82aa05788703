"""Averages models in their weights: checkpoints of one run (Polyak; section 3.4.3 of the paper), or models of several runs (4.1.5).

Each parameter is summed in FP64, one layer and one model at a time, and rounded once: memory holds four times the largest tensor, however
many models there are.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from herd_jax.errors import UserError
from herd_jax.files import user_path
from herd_jax.interop.formats.workdir import CHECKPOINTS, newest_checkpoints
from herd_jax.interop.load import open_source
from herd_jax.interop.save import save
from herd_jax.interop.source import Source

_BLOCK_ROWS = 1024  # rows of a tensor that are widened to FP64 at a time


def average(sources: Sequence[str | Path], target: str | Path, weights: Sequence[float] = (), last: int | None = None, to: str = "herd",
            dtype: str = "float32") -> list[tuple[Path, float]]:  # fmt: skip
    """Writes the weighted mean of models to the new directory `target`; returns each model that went into it and its share.

    `sources` are whatever `open_source` opens, also `WORKDIR/checkpoints/STEP`. With `last` each is the workdir of a run and stands for its
    `last` newest checkpoints, in equal shares. `weights`, one for each source, are divided by their sum (none: all models count alike).
    Raises UserError as `open_source` and `save` do, for weights that are no positive numbers or too few or many, and for models that
    differ in architecture or tokenizer.
    """
    if weights and len(weights) != len(sources):
        raise UserError(f"--weights has {len(weights)} numbers and --source {len(sources)} paths: give one weight for each path")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise UserError(f"--weights is {', '.join(map(str, weights))}: each must be a positive finite number")
    groups = [_checkpoints(user_path(source), last) if last is not None else [user_path(source)] for source in sources]
    models = [open_source(path) for group in groups for path in group]
    relative = weights or [1.0] * len(sources)
    shares = [weight / len(group) / math.fsum(relative) for weight, group in zip(relative, groups, strict=True) for _ in group]
    for model in models:
        if model.config.fp8:
            raise UserError(f"{model.path} is quantized to FP8, and such weights are not averaged: give the model that it was made from")
    for model in models[1:]:
        _check_alike(models[0], model)

    def mean(name: str, layer: int | None = None) -> np.ndarray:
        """Returns the weighted mean of a parameter, in FP32."""
        total = None
        for model, share in zip(models, shares, strict=True):
            values = model.read(name, layer)
            is_first, total = total is None, np.empty(values.shape) if total is None else total
            for start in range(0, len(values), _BLOCK_ROWS):
                rows = slice(start, start + _BLOCK_ROWS)
                part = share * values[rows].astype(np.float64)
                total[rows] = part if is_first else total[rows] + part
        if not np.isfinite(total).all():
            raise UserError(f"{name} of a model is not finite, and so its average would not be: leave out the model that is damaged")
        return total.astype(np.float32)

    tokenizer = next((model.tokenizer for model in models if model.tokenizer), None)
    lengths = [model.context_length for model in models if model.context_length]
    save(target, to, models[0].config, mean, dtype, tokenizer, min(lengths, default=None))
    return [(model.path, share) for model, share in zip(models, shares, strict=True)]


def _checkpoints(workdir: Path, last: int) -> list[Path]:
    if last < 1:
        raise UserError(f"--last is {last}: it must be 1 or more")
    if not (workdir / CHECKPOINTS).is_dir():
        raise UserError(f"{workdir} is no workdir of a training run, and --last counts the checkpoints of one: leave it out, or name one")
    return newest_checkpoints(workdir, last)


def _check_alike(first: Source, other: Source) -> None:
    """Raises UserError naming what differs. How the weights were drawn does not matter, nor a tokenizer that only one of them has."""
    for field in dataclasses.fields(first.config):
        ours, theirs = getattr(first.config, field.name), getattr(other.config, field.name)
        if field.name != "init_std" and ours != theirs:
            raise UserError(
                f"{first.path} has {field.name} {ours} and {other.path} has {theirs}: only models of one architecture can be averaged"
            )
    if first.tokenizer and other.tokenizer and first.tokenizer.fingerprint != other.tokenizer.fingerprint:
        raise UserError(
            f"{first.path} and {other.path} have different tokenizers, so their embeddings mean different things: "
            "average models of one tokenizer"
        )
