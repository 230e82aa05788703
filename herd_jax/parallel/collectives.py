"""The communications of one device, by name. Each is the identity on a mesh axis of size 1, so that no needless message is sent.

All run inside a fully manual `jax.shard_map(check_vma=False)`. There, the transpose of `all_gather` is `reduce_scatter` and the
other way round, which is what partial cotangents need; `psum` is only used where nothing is differentiated through it.
"""

import math

import jax
from jax import lax

Axes = str | tuple[str, ...]


def axis_size(axes: Axes) -> int:
    """Returns the number of devices along a mesh axis, or along several together."""
    return math.prod(lax.axis_size(axis) for axis in ((axes,) if isinstance(axes, str) else axes))


def all_gather(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Concatenates every device's part of `x` along `dim`."""
    return x if axis_size(axes) == 1 else lax.all_gather(x, axes, axis=dim, tiled=True)


def reduce_scatter(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """Sums `x` over devices; each keeps its part of the sum along `dim`."""
    size = axis_size(axes)
    if size == 1:
        return x
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        # gloo's reduce-scatter sometimes sends the end of a message of more than 64 KiB after its memory was overwritten (jaxlib 0.10.2).
        parts = x.reshape(*x.shape[:dim], size, x.shape[dim] // size, *x.shape[dim + 1 :])
        return lax.all_to_all(parts, axes, dim, dim, tiled=True).sum(dim)
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def all_reduce(x, axes: Axes):
    """Sums `x` (a pytree) over devices. Do not differentiate through it."""
    axes = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if lax.axis_size(axis) > 1)
    return lax.psum(x, axes) if axes else x


def all_max(x: jax.Array, axis: str) -> jax.Array:
    """Returns the elementwise maximum over devices. Do not differentiate through it."""
    return x if axis_size(axis) == 1 else lax.pmax(x, axis)


def shift(x: jax.Array, axis: str, by: int) -> jax.Array:
    """Sends `x` to the device `by` further along the ring of `axis`, and returns what came from the one `by` before."""
    size = axis_size(axis)
    return x if size == 1 else lax.ppermute(x, axis, [(i, (i + by) % size) for i in range(size)])
