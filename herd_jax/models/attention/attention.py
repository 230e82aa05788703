"""Attention: the one function that the models call, the choice of its implementation, and the dense oracle.

What a query may see is one range of keys, `start <= s < end`, in the order of the row, or a few. One covers causal attention,
documents packed in one row, and zigzag context parallelism, where the queries of a device are not contiguous in the row; two cover a
prompt with several responses, each of which sees the prompt and itself.
"""

import importlib.util
import math

import jax
import jax.numpy as jnp

from herd_jax.errors import UserError
from herd_jax.models.attention.blockwise import blockwise_attention
from herd_jax.models.attention.gpu import cudnn_attention, tokamax_attention
from herd_jax.models.attention.ranges import Ranges, visible

IMPLEMENTATIONS = ("auto", "dense", "blockwise", "tokamax", "cudnn")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    ranges: Ranges,
    implementation: str,
    *,
    causal_rows: bool = False,
    all_see: bool = False,
) -> jax.Array:
    """Computes softmax attention with grouped query heads (section 3.2 of the paper) for one device's share of a micro-batch.

    Args:
        q_BTNH: queries; head n attends with kv head n // (N / K).
        k_BSKH, v_BSKH: all keys and values of the row, in row order.
        ranges: pairs (start_BT, end_BT), int32; query t sees the keys start <= s < end of each, 0 <= start, end <= S. A query's
            ranges do not overlap. A query with start >= end in all of them sees nothing: its output and its part of every
            gradient are 0.
        implementation: what `choose` returned.
        causal_rows: a promise that query t sits at index t of the row (no context parallelism) and that each first range is
            empty or ends at t + 1, which lets `tokamax` leave out the tiles above the diagonal in its backward pass.
        all_see: a promise that each query sees a key, which saves `tokamax` a second output and a mask of its size.

    Returns:
        o_BTNH in the dtype of q; scores and softmax are FP32, scaled by 1 / sqrt(H).
    """
    match implementation:
        case "dense":
            return dense_attention(q_BTNH, k_BSKH, v_BSKH, ranges)
        case "blockwise":
            return blockwise_attention(q_BTNH, tuple((k_BSKH, v_BSKH, start_BT, end_BT) for start_BT, end_BT in ranges))
        case "tokamax":
            return tokamax_attention(q_BTNH, k_BSKH, v_BSKH, ranges, causal_rows=causal_rows, all_see=all_see)
        case "cudnn":
            return cudnn_attention(q_BTNH, k_BSKH, v_BSKH)
    raise AssertionError(f"not an implementation: {implementation!r}")


def choose(implementation: str, *, platform: str, context_parallel: bool, document_mask: bool) -> str:
    """Returns the implementation to run for the configured one, which may be `auto`.

    Args:
        implementation: one of IMPLEMENTATIONS. `auto` is `blockwise` on a CPU. On a GPU, where that is many times slower than a kernel (it
            waits for the host at each block), `auto` is `tokamax` where it is installed, or `cudnn` where that is exact.
        platform: of the devices, `cpu` or `gpu`.
        context_parallel: the cp axis is longer than 1.
        document_mask: documents packed in one row are kept apart.

    Raises:
        UserError: the name is unknown, or the implementation is not there or would ignore a mask.
    """
    on_gpu = platform in ("gpu", "cuda")
    match implementation:
        case "auto" if not on_gpu:
            return "blockwise"
        case "auto" if has_tokamax() or not (document_mask or context_parallel):
            return "tokamax" if has_tokamax() else "cudnn"
        case "auto":
            raise UserError(
                "train.attention 'auto' finds no kernel for this GPU: pip install 'herd-jax[gpu]' on Python 3.12 or newer, which brings tokamax, or "
                "set train.attention=blockwise, which gives the same results many times slower"
            )
        case "dense" | "blockwise":
            return implementation
        case "tokamax" | "cudnn" if not on_gpu:
            raise UserError(f"train.attention '{implementation}' runs on GPUs only, not on {platform}: choose 'auto' or 'blockwise'")
        case "tokamax" if not has_tokamax():
            raise UserError("train.attention 'tokamax' needs the tokamax package: pip install 'herd-jax[gpu]' on Python 3.12 or newer")
        case "cudnn" if context_parallel or document_mask:
            ignored = "the order of the queries that mesh.cp > 1 gives them" if context_parallel else "the document mask"
            raise UserError(f"train.attention 'cudnn' would ignore {ignored}: choose 'auto', 'tokamax' or 'blockwise'")
        case "tokamax" | "cudnn":
            return implementation
    raise UserError(f"train.attention is '{implementation}': it must be one of {', '.join(IMPLEMENTATIONS)}")


def has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def dense_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ranges: Ranges) -> jax.Array:
    """Computes attention the plain way, as the oracle for the others; see `attention` for the contract.

    It materialises the scores [B, K, G, T, S], so its memory is quadratic.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    s_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) / math.sqrt(H)
    visible_BTS = visible(ranges, S)
    # A large finite score, not -inf: the softmax of a row without a visible key stays finite, and is then set to 0.
    p_BKGTS = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], s_BKGTS, -1e30), axis=-1)
    p_BKGTS = jnp.where(visible_BTS[:, None, None], p_BKGTS, 0)
    o_BTKGH = jnp.einsum("bkgts,bskh->btkgh", p_BKGTS, v_BSKH, preferred_element_type=jnp.float32)
    return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
