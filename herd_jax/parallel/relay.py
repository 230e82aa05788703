"""The relay of inference: one batch goes through the pipeline's stages one after the other, and the other ranks wait. It knows no model.

A rank holds one stage. A stage may keep something on its rank (keys and values), of the same shapes on every rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from herd_jax.parallel import collectives
from herd_jax.parallel.pipeline import when

PyTree = Any


def relay(
    layers_per_stage: Sequence[int], run: Callable[[jax.Array, int], tuple[jax.Array, PyTree]], x_BTD: jax.Array
) -> tuple[jax.Array, PyTree]:
    """Runs `run(x_BTD, stage) -> (x_BTD, what is kept)` for each stage that has layers, in order, on the rank that has them.

    Returns the last activations, the same on every pp rank, and what this rank's stage kept: zeros where it has no layers.
    """
    if len(layers_per_stage) == 1:
        return run(x_BTD, 0)
    stages = [stage for stage, num_layers in enumerate(layers_per_stage) if num_layers]
    kept = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(lambda x: run(x, stages[0])[1], x_BTD))
    for stage in stages:
        mine = (lax.axis_index("pp") == stage).astype(jnp.int32)
        x_BTD, kept = when(mine, lambda carry, stage=stage: run(carry[0], stage), (x_BTD, kept))
        x_BTD = collectives.all_reduce(jnp.where(mine == 1, x_BTD, 0), "pp")
    return x_BTD, kept
