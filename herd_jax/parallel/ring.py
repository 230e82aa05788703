"""Products with matrices at the borders of tensor-parallel blocks, where the sequence is gathered or scattered over tp, taken apart into parts of
the sequence: while one part is multiplied, the next is on its way (Wang et al. 2023, "Overlap communication with dependent computation via
decomposition"). `parallel/tensor.py` has the same in two steps, as the oracle. Where a product is too small to hide its message, both stay whole, and
in the backward each message is put beside a product that does not wait for it.

The barriers say which message runs beside which product: XLA's scheduler keeps results together that a barrier joins.
"""

from collections.abc import Callable, Iterator

import jax
from jax import lax

from herd_jax.parallel import collectives

LEAST_COLUMNS = 1024  # of a rank, from which on the product of a part takes half as long as its message, or longer (H100, NVLink)


@jax.custom_vjp
def gather_product(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """Multiplies the sequence [B, T / tp, D] of all tp ranks by a matrix: returns [B, T, E]."""
    if w_DE.shape[1] < LEAST_COLUMNS:
        return _product(collectives.all_gather(x_BTD, "tp", dim=1), w_DE)
    y_BTE = None
    for at, (part_BTE,) in _parts(x_BTD, lambda part_BTD: (_product(part_BTD, w_DE),)):
        y_BTE = _put(y_BTE, part_BTE, at)
    return y_BTE


def _gather_product_forward(x_BTD, w_DE):
    return gather_product(x_BTD, w_DE), (x_BTD, w_DE)


def _gather_product_backward(residuals, dy_BTE):
    x_BTD, w_DE = residuals
    x_BTD = collectives.all_gather(x_BTD, "tp", dim=1)
    if w_DE.shape[1] >= LEAST_COLUMNS:
        return product_scatter(dy_BTE, w_DE.T), _gradient(x_BTD, dy_BTE, w_DE.dtype)
    # The gather runs beside one product, the scatter beside the other.
    x_BTD, dx_BTD = lax.optimization_barrier((x_BTD, _product(dy_BTE, w_DE.T)))
    dx_BTD, dw_DE = collectives.reduce_scatter(dx_BTD, "tp", dim=1), _gradient(x_BTD, dy_BTE, w_DE.dtype)
    return lax.optimization_barrier((dx_BTD, dw_DE))


gather_product.defvjp(_gather_product_forward, _gather_product_backward)


@jax.custom_vjp
def product_scatter(x_BTE: jax.Array, w_ED: jax.Array) -> jax.Array:
    """Multiplies [B, T, E] by this rank's rows of a matrix and adds up over tp: returns this rank's part [B, T / tp, D] of the sum."""
    if w_ED.shape[0] < LEAST_COLUMNS:
        return collectives.reduce_scatter(_product(x_BTE, w_ED), "tp", dim=1)
    tp, rank = collectives.axis_size("tp"), lax.axis_index("tp")
    size, total_BTD = x_BTE.shape[1] // tp, None
    for step in range(tp):  # the sum of a rank's part begins at its neighbour and arrives last
        at = (rank + tp - 1 - step) % tp * size
        part_BTE = lax.dynamic_slice_in_dim(x_BTE, at, size, 1)
        if total_BTD is None:
            total_BTD = _product(part_BTE, w_ED)
        else:  # the product waits for the sum before, so that the sum travels beside it
            part_BTE, total_BTD = lax.optimization_barrier((part_BTE, total_BTD))
            moved_BTD, part_BTD = collectives.shift(total_BTD, "tp", 1), _product(part_BTE, w_ED)
            total_BTD = sum(lax.optimization_barrier((moved_BTD, part_BTD)))
    return total_BTD


def _product_scatter_forward(x_BTE, w_ED):
    return product_scatter(x_BTE, w_ED), (x_BTE, w_ED)


def _product_scatter_backward(residuals, dy_BTD):
    x_BTE, w_ED = residuals
    if w_ED.shape[0] < LEAST_COLUMNS:
        whole_BTD = collectives.all_gather(dy_BTD, "tp", dim=1)
        return _product(whole_BTD, w_ED.T), _gradient(x_BTE, whole_BTD, w_ED.dtype)
    dx_BTE, whole_BTD = None, None
    for at, (part_BTE, part_BTD) in _parts(dy_BTD, lambda part_BTD: (_product(part_BTD, w_ED.T), part_BTD)):
        dx_BTE, whole_BTD = _put(dx_BTE, part_BTE, at), _put(whole_BTD, part_BTD, at)
    return dx_BTE, _gradient(x_BTE, whole_BTD, w_ED.dtype)


product_scatter.defvjp(_product_scatter_forward, _product_scatter_backward)


def _parts(x_BTD: jax.Array, use: Callable[[jax.Array], tuple]) -> Iterator[tuple[jax.Array, tuple]]:
    """Yields where in the sequence each rank's part begins, and `use` of the part, this rank's first. While a part is used the next one comes, and
    none is sent on before that."""
    tp, rank = collectives.axis_size("tp"), lax.axis_index("tp")
    for step in range(tp):
        following, used = collectives.shift(x_BTD, "tp", 1) if step < tp - 1 else None, use(x_BTD)
        following, used = lax.optimization_barrier((following, used))
        yield (rank - step) % tp * x_BTD.shape[1], used
        x_BTD = following


def _put(whole: jax.Array | None, part: jax.Array, at: jax.Array) -> jax.Array:
    if whole is None:
        whole = lax.empty((part.shape[0], part.shape[1] * collectives.axis_size("tp"), part.shape[2]), part.dtype)
    return lax.dynamic_update_slice_in_dim(whole, part, at, 1)


def _product(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
    return lax.dot_general(x_BTD, w_DE, (((2,), (0,)), ((), ())), preferred_element_type=x_BTD.dtype)


def _gradient(x_BTD: jax.Array, dy_BTE: jax.Array, dtype) -> jax.Array:
    return lax.dot_general(x_BTD, dy_BTE, (((0, 1), (0, 1)), ((), ())), preferred_element_type=dtype)
