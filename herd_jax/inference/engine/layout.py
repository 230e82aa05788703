"""Where keys and values lie: pages of a pool, one pool for each layer slot, and the attention that reads them.

Page 0 is the bin: what a padded token writes goes there, and nobody reads it. The pages of a sequence stand in its row of a table, in order.
A key and a value are written before they are read: XLA would otherwise copy the whole pool.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

BIN = 0  # number of the page that nobody reads
POOL_SPEC = PartitionSpec("pp", "tp")  # of keys [PP P, K, H, page] and values [PP P, K, page, H]: each pipeline rank has all pages of its layers
MASKED = -1e30  # a score that is never the largest where something is visible, and keeps everything finite where nothing is


class Pool(NamedTuple):
    """The keys [P, K, H, page] and values [P, K, page, H] of a layer slot on one device; products of few queries read them fastest so."""

    k: jax.Array
    v: jax.Array


class Places(NamedTuple):
    """Where the T tokens of B rows lie: the row's pages, the position of its first token, and how many of the T are tokens at all."""

    table_BN: jax.Array
    start_B: jax.Array
    count_B: jax.Array


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """The pools of a model: `num_pages` pages (the bin among them) of `page_size` tokens."""

    num_pages: int
    page_size: int

    def shapes(self, num_ranks: int, num_kv_heads: int, head_dim: int) -> Pool:
        """Returns the shapes of a layer slot's pool over a whole mesh."""
        before = (num_ranks * self.num_pages, num_kv_heads)
        return Pool((*before, head_dim, self.page_size), (*before, self.page_size, head_dim))

    def write(self, pool: Pool, k_BTKH: jax.Array, v_BTKH: jax.Array, places: Places) -> Pool:
        """Returns the pool with the keys and values of a step's tokens in their pages."""
        page_BT, offset_BT = self._spots(places, k_BTKH.shape[1])
        if page_BT.size == 1:  # a scatter of one token would check its bounds by reading, for which XLA copies the pool
            k = lax.dynamic_update_slice(pool.k, k_BTKH[0, ..., None], (page_BT[0, 0], 0, 0, offset_BT[0, 0]))
        else:
            k = pool.k.at[page_BT, :, :, offset_BT].set(k_BTKH)
        return Pool(k, put_rows(pool.v, v_BTKH, page_BT, offset_BT))

    def _spots(self, places: Places, num_tokens: int) -> tuple[jax.Array, jax.Array]:
        """Returns the page of each of T tokens, the bin for those that are none, and the token's place in the page: [B, T] each."""
        index_T = jnp.arange(num_tokens)
        position_BT = places.start_B[:, None] + index_T
        number_BT = jnp.minimum(position_BT // self.page_size, places.table_BN.shape[1] - 1)
        page_BT = jnp.where(index_T < places.count_B[:, None], jnp.take_along_axis(places.table_BN, number_BT, 1), BIN)
        return page_BT, position_BT % self.page_size

    def read(self, q_BTNH: jax.Array, pool: Pool, places: Places, offset: int | jax.Array = 0) -> jax.Array:
        """Returns the attention of queries to the keys up to their own position, [B, T, N, H]; `offset`: the queries are the step's tokens from
        that one on.

        One page of every row at a time, with a running softmax, as far as the longest row goes: a page beyond a row's end changes nothing.
        """
        (B, T, N, H), K = q_BTNH.shape, pool.k.shape[1]
        q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H) / math.sqrt(H)
        position_BT = places.start_B[:, None] + offset + jnp.arange(T)
        position_B1M1 = jnp.tile(position_BT, (1, N // K))[:, None, :, None]
        product = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)

        def page(number, carry):
            most_BKM1, sum_BKM1, o_BKMH = carry
            page_B = lax.dynamic_index_in_dim(places.table_BN, number, 1, keepdims=False)
            key_S = number * self.page_size + jnp.arange(self.page_size)
            score_BKMS = jnp.where(key_S <= position_B1M1, product(q_BKMH, pool.k[page_B]), MASKED)
            new_BKM1 = jnp.maximum(most_BKM1, score_BKMS.max(-1, keepdims=True))
            shrink_BKM1, p_BKMS = jnp.exp(most_BKM1 - new_BKM1), jnp.exp(score_BKMS - new_BKM1)
            o_BKMH = o_BKMH * shrink_BKM1 + product(p_BKMS.astype(pool.v.dtype), pool.v[page_B])
            return new_BKM1, sum_BKM1 * shrink_BKM1 + p_BKMS.sum(-1, keepdims=True), o_BKMH

        zero_BKM1 = jnp.zeros((*q_BKMH.shape[:3], 1), jnp.float32)
        num_pages = jnp.where(places.count_B > 0, -(-(places.start_B + places.count_B) // self.page_size), 0).max()
        start = zero_BKM1 + MASKED, zero_BKM1, jnp.zeros(q_BKMH.shape, jnp.float32)
        _, sum_BKM1, o_BKMH = lax.fori_loop(0, num_pages, page, start)
        o_BKGTH = (o_BKMH / jnp.maximum(sum_BKM1, 1e-30)).reshape(B, K, N // K, T, H)
        return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)

    def copy(self, pool: Pool, source_B: jax.Array, target_B: jax.Array) -> Pool:
        """Returns the pool with the pages `source_B` copied to `target_B`, one by one."""

        def one(i, pool):
            take = lambda a: lax.dynamic_index_in_dim(a, source_B[i], 0)
            put = lambda a: lax.dynamic_update_slice_in_dim(a, take(a), target_B[i], 0)
            return Pool(put(pool.k), put(pool.v))

        return lax.fori_loop(0, len(source_B), one, pool)


def put_rows(pool: jax.Array, x_BTKH: jax.Array, page_BT: jax.Array, offset_BT: jax.Array) -> jax.Array:
    """Returns a pool [P, K, page, H] with the keys or values of tokens in their pages; see `PageLayout.write`."""
    if page_BT.size == 1:
        return lax.dynamic_update_slice(pool, x_BTKH.swapaxes(1, 2), (page_BT[0, 0], 0, offset_BT[0, 0], 0))
    return pool.at[page_BT, :, offset_BT].set(x_BTKH)
