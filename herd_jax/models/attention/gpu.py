"""Attention by the GPU kernels of other libraries: tokamax, which takes ranges, and cuDNN, where plain causal is exact.

Which of them may be used is decided by `attention.choose`.
"""

import jax
import jax.numpy as jnp

from herd_jax.models.attention.ranges import Ranges, sees_something, visible


def tokamax_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ranges: Ranges, *, causal_rows: bool, all_see: bool
) -> jax.Array:
    """Computes flash attention by tokamax over the keys that the ranges let each query see; see `attention.attention` for the contract.

    The public function of tokamax takes a dense mask only; its op layer takes one range, in a `Mask`. The forward kernels skip
    the tiles outside it. The backward kernel of Mosaic visits every tile, except above the diagonal of a causal mask: so
    where the range ends at the diagonal (`causal_rows`), it is passed as a causal mask with a start. The backward kernel of
    Triton makes a dense boolean mask of the range. Several ranges are passed as a dense boolean mask.
    """
    from tokamax._src.ops.attention.base import Mask  # optional: pip install 'herd-jax[gpu]'

    sees_BT = sees_something(ranges)
    start_BT, end_BT = ranges[0]
    if len(ranges) > 1:
        # A query that sees nothing is given the first key here: a row that is masked as a whole may be NaN.
        seen_BTS = visible(ranges, k_BSKH.shape[1]) | (~sees_BT[..., None] & (jnp.arange(k_BSKH.shape[1]) == 0))
        mask = Mask(seen_BTS[:, None])
    elif causal_rows:
        # A query that sees nothing is given its own key here: a row masked by start and diagonal together is NaN in Mosaic.
        row_T = jnp.arange(q_BTNH.shape[1], dtype=start_BT.dtype)
        mask = Mask(k_start=jnp.where(sees_BT, start_BT, row_T)[:, None], is_causal=True)
    else:
        mask = Mask(k_start=start_BT[:, None], k_end=end_BT[:, None])
    o_BTNH = _flash_kernel(q_BTNH.dtype)(q_BTNH, k_BSKH, v_BSKH, mask=mask)
    if all_see:
        return o_BTNH
    # Not every kernel gives 0 to a query that sees nothing; its cotangent becomes 0 here too, and with it its gradients.
    return jnp.where(sees_BT[:, :, None, None], o_BTNH, 0)


def _flash_kernel(dtype):
    """Returns the fastest kernel with a backward pass for this GPU and dtype: Mosaic on Hopper and Blackwell, else Triton."""
    from tokamax._src.ops.attention.api import IMPLEMENTATIONS

    capability = float(jax.local_devices()[0].compute_capability)
    has_mosaic = 9 <= capability < 11 and dtype in (jnp.bfloat16, jnp.float16)
    return IMPLEMENTATIONS["mosaic_gpu" if has_mosaic else "triton"]


def cudnn_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """Computes causal attention of whole rows by cuDNN (BF16 or FP16), without a document mask and without context parallelism."""
    assert q_BTNH.shape[1] == k_BSKH.shape[1], "cudnn attention needs the queries of the whole row"
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn")
