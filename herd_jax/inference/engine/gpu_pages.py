"""Pages on GPUs: attention by one kernel that goes over a row's pages where they lie.

It is flash attention over a block table (PagedAttention, arXiv 2309.06180), and its keys are split over programs (flash-decoding): few rows with long
contexts fill the GPU too. It is written in Pallas and lowered through Triton, which jax 0.12 still does, and calls deprecated.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from herd_jax.inference.engine.layout import MASKED, PageLayout, Places, Pool, put_rows

LEAST_TILE = 16  # rows of the smallest product of a tensor core
MOST_QUERIES = {2: 64, 4: 16}  # of a tile, by the bytes of a number: FP32 takes no tensor core, and its products more registers
NUM_KEYS = {2: 64, 4: 32}  # of a tile


@dataclasses.dataclass(frozen=True)
class GpuPageLayout(PageLayout):
    """The pools of a model on GPUs. `num_programs`: to how many the kernel is split up, if the rows do not make as many: four for each core of a
    large GPU. `interpret`: for tests, the kernel runs on a CPU.

    Keys lie like values, [P, K, page, H]: a token is written in one piece of H numbers, where [P, K, H, page] would take a transaction for each
    number, and is read in one; tensor cores multiply by either order alike.
    """

    num_programs: int = 512
    interpret: bool = False

    def shapes(self, num_ranks: int, num_kv_heads: int, head_dim: int) -> Pool:
        """Returns the shapes of a layer slot's pool over a whole mesh."""
        shape = (num_ranks * self.num_pages, num_kv_heads, self.page_size, head_dim)
        return Pool(shape, shape)

    def write(self, pool: Pool, k_BTKH: jax.Array, v_BTKH: jax.Array, places: Places) -> Pool:
        """Returns the pool with the keys and values of a step's tokens in their pages."""
        spots = self._spots(places, k_BTKH.shape[1])
        return Pool(put_rows(pool.k, k_BTKH, *spots), put_rows(pool.v, v_BTKH, *spots))

    def read(self, q_BTNH: jax.Array, pool: Pool, places: Places, offset: int | jax.Array = 0) -> jax.Array:
        """Returns the attention of queries [B, T, N, H] to the keys up to their own position, [B, T, N, H], as `PageLayout.read` does.

        Rows without tokens give zeros, and what stands in pages beyond a row's end is not read. Each program takes a tile of a row's queries, all
        heads that share a kv head together, and a part X of the keys that they see; the parts are put together at the end.
        """
        (B, T, N, H), K = q_BTNH.shape, pool.k.shape[1]
        num_queries = T * N // K
        tile_M, tile_S = min(tile(num_queries), MOST_QUERIES[pool.k.dtype.itemsize]), NUM_KEYS[pool.k.dtype.itemsize]
        num_tiles = pl.cdiv(num_queries, tile_M)
        most_splits = pl.cdiv(places.table_BN.shape[1] * self.page_size, tile_S)
        num_splits = min(pl.cdiv(self.num_programs, B * K * num_tiles), most_splits)
        end_B = jnp.where(places.count_B > 0, places.start_B + places.count_B, 0)
        kernel = functools.partial(_attend, page_size=self.page_size, tile_M=tile_M, tile_S=tile_S, tile_H=tile(H))
        whole = pl.BlockSpec()  # the kernel says itself what it reads
        o_XBTNH, most_XBTN, sum_XBTN = pl.pallas_call(
            kernel,
            [jax.ShapeDtypeStruct((num_splits, B, T, N, *last), jnp.float32) for last in ([H], [], [])],
            grid=(num_tiles, B * K, num_splits),
            in_specs=[whole] * 6,
            out_specs=[whole] * 3,
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            interpret=self.interpret,
            name="paged_attention",
        )(q_BTNH, *pool, places.table_BN, places.start_B + offset, end_B)
        share_XBTN = jnp.exp2(most_XBTN - most_XBTN.max(0))
        o_BTNH = (o_XBTNH * share_XBTN[..., None]).sum(0) / jnp.maximum((sum_XBTN * share_XBTN).sum(0), 1e-30)[..., None]
        return o_BTNH.astype(q_BTNH.dtype)


def tile(size: int) -> int:
    """Returns the size of a tile that holds `size` rows: Triton knows powers of two."""
    return max(LEAST_TILE, pl.next_power_of_2(size))


def _attend(q_BTNH, k_PKSH, v_PKSH, table_BN, start_B, end_B, o_XBTNH, most_XBTN, sum_XBTN, *, page_size: int, tile_M: int, tile_S: int, tile_H: int):
    """Computes one tile of queries with one part of the keys: their sum weighted by exp2(score - most), the most, and the sum of the weights.

    Query m of a row and kv head is that of token m // G and head m % G of the G that share the kv head. Its score is in powers of two.
    """
    (_, T, N, H), K = q_BTNH.shape, k_PKSH.shape[1]
    G = N // K
    row, head, split = pl.program_id(1) // K, pl.program_id(1) % K, pl.program_id(2)
    m_M, h_1H = pl.program_id(0) * tile_M + jnp.arange(tile_M), jnp.arange(tile_H)[None]
    t_M, n_M, is_M, is_1H = m_M // G, head * G + m_M % G, m_M < T * G, h_1H < H
    at_MH, is_MH = (row, t_M[:, None], n_M[:, None], h_1H), is_M[:, None] & is_1H
    precision = lax.Precision.HIGHEST if k_PKSH.dtype == jnp.float32 else None  # FP32 is not to become TF32
    product = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    q_MH = triton.load(q_BTNH.at[at_MH], mask=is_MH, other=0)
    position_M = start_B[row] + t_M

    # The keys that the last query of the tile sees, in parts of whole tiles; a short row has parts without a key.
    last = jnp.minimum((pl.program_id(0) * tile_M + tile_M - 1) // G, T - 1)
    end = jnp.minimum(end_B[row], start_B[row] + last + 1)
    num_tiles = pl.cdiv(end, tile_S)
    each = pl.cdiv(num_tiles, pl.num_programs(2))

    def keys(number, carry):
        most_M, sum_M, o_MH = carry
        key_S = number * tile_S + jnp.arange(tile_S)
        is_S = key_S < end  # what lies beyond is not read: it may be anything, NaN too
        page_S = triton.load(table_BN.at[row, key_S // page_size], mask=is_S, other=0)
        at_SH, is_SH = (page_S[:, None], head, key_S[:, None] % page_size, h_1H), is_S[:, None] & is_1H
        k_SH = triton.load(k_PKSH.at[at_SH], mask=is_SH, other=0)
        v_SH = triton.load(v_PKSH.at[at_SH], mask=is_SH, other=0)
        score_MS = jnp.where(key_S <= position_M[:, None], product(q_MH, k_SH.T) * (math.log2(math.e) / math.sqrt(H)), MASKED)
        new_M = jnp.maximum(most_M, score_MS.max(1))
        shrink_M, p_MS = jnp.exp2(most_M - new_M), jnp.exp2(score_MS - new_M[:, None])
        o_MH = o_MH * shrink_M[:, None] + product(p_MS.astype(v_SH.dtype), v_SH)
        return new_M, sum_M * shrink_M + p_MS.sum(1), o_MH

    zero_M, zero_MH = jnp.zeros(tile_M, jnp.float32), jnp.zeros((tile_M, tile_H), jnp.float32)
    start, stop = split * each, jnp.minimum((split + 1) * each, num_tiles)
    most_M, sum_M, o_MH = lax.fori_loop(start, stop, keys, (zero_M + MASKED, zero_M, zero_MH))
    triton.store(o_XBTNH.at[split, *at_MH], o_MH, mask=is_MH)
    triton.store(most_XBTN.at[split, row, t_M, n_M], most_M, mask=is_M)
    triton.store(sum_XBTN.at[split, row, t_M, n_M], sum_M, mask=is_M)
