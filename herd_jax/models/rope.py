"""Rotary position embedding with the frequency scaling of Llama 3.1. Pairs are (i, i + H / 2), as Hugging Face has them; Meta's are adjacent."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Low frequencies divided by `factor`, high ones kept, a blend between; factor 1 is no scaling (Meta's llama-models)."""

    factor: float = 8.0  # by which low frequencies are divided; 1: no scaling
    low_freq_factor: float = 1.0  # wavelengths above original_max_position / this are scaled in full
    high_freq_factor: float = 4.0  # wavelengths below original_max_position / this are kept
    original_max_position: int = 8192  # tokens of context before scaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Returns the radians per position of each pair: float64 [H / 2]."""
    base = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return base
    wavelength = 2 * math.pi / base
    keep = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)  # 0 where the wavelength is long, 1 where it is short
    return (1 - keep) * base / scaling.factor + keep * base


def rotations(positions_BT: jax.Array, frequencies_h: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines, FP32 [B, T, H / 2]."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies_h, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Rotates the pairs of each head, in FP32; any number of head dims may stand between T and H."""
    between = [1] * (x_BTNH.ndim - 3)
    cos, sin = (a.reshape(*a.shape[:2], *between, a.shape[2]) for a in (cos_BTh, sin_BTh))
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
