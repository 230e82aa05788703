"""Prefill and decode with a KV cache: the simple exact way, as one device's share. tp splits heads, feed-forward dim and vocabulary, pp the
layers; rows are the same on all dp and cp ranks.

Rows are padded on the left, so that all of them write the cache at the same index.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from herd_jax.inference.weights import apart_specs
from herd_jax.mesh import on_mesh
from herd_jax.models.attention.attention import attention
from herd_jax.models.config import LlamaConfig
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.parallel import collectives, tensor
from herd_jax.parallel.relay import relay

CACHE_SPEC = PartitionSpec("pp", None, "tp")  # of keys [PP, B, K, H, S] and values [PP, B, K, S, H], a pair for each layer slot


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model on a mesh, each pipeline rank with one chunk of layers. `dtype` is that of the weights, which are those of `Weights.apart`, the
    activations and the cache."""

    model: Llama
    layout: Layout
    dtype: jnp.dtype

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    @functools.cached_property
    def num_slots(self) -> int:
        """Returns the number of layer slots of a pipeline rank."""
        return max(1, *self.layout.layers_per_stage)

    @functools.cached_property
    def prefill(self):
        """Returns, for a cache size S, the function (weights, ids [B, T], padding [B]) -> (FP32 logits [B, V] after the last id, cache).

        The first `padding` ids of a row are not looked at; T >= 1, S >= T.
        """
        return functools.cache(self._prefill_of_size)

    def _prefill_of_size(self, cache_size: int):
        def run(weights, ids_BT, padding_B):
            rotation, T = self._rotation(jnp.arange(ids_BT.shape[1]), padding_B), ids_BT.shape[1]
            index_BT = jnp.broadcast_to(jnp.arange(T), ids_BT.shape)
            start_BT = jnp.broadcast_to(padding_B[:, None], ids_BT.shape)

            def attend(q_BTNH, k_BTKH, v_BTKH, slot):
                grow = lambda a: jnp.pad(a, ((0, 0), (0, cache_size - T), (0, 0), (0, 0)))
                o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, ((start_BT, index_BT + 1),), "blockwise", causal_rows=True)
                return o_BTNH, for_cache(grow(k_BTKH), grow(v_BTKH))

            return self._forward(weights, ids_BT, rotation, attend)

        return self.jit(run, (self.weight_specs, PartitionSpec(), PartitionSpec()), (PartitionSpec(), self._cache_specs))

    @functools.cached_property
    def decode(self):
        """Returns the function (weights, cache, ids [B], padding [B], index) -> (FP32 logits [B, V] after `ids`, cache with them at `index`).

        The cache is donated. The function makes two calls: the first reads the cache, the second writes the new keys and values into it. In one
        call XLA's CPU backend would copy the cache at each step, to read what it also writes.
        """

        def run(weights, cache, ids_B, padding_B, index):
            rotation = self._rotation(index[None], padding_B)

            def attend(q_BTNH, k_BTKH, v_BTKH, slot):
                return cached_attention(q_BTNH, k_BTKH, v_BTKH, *cache[slot], padding_B, index), for_cache(k_BTKH, v_BTKH)

            return self._forward(weights, ids_B[:, None], rotation, attend)

        def write(cache, new, index):
            put = lax.dynamic_update_slice_in_dim
            return [(put(k, new_k, index, axis=4), put(v, new_v, index, axis=3)) for (k, v), (new_k, new_v) in zip(cache, new)]

        everywhere = PartitionSpec()
        run = self.jit(run, (self.weight_specs, self._cache_specs, *[everywhere] * 3), (everywhere, self._cache_specs))
        write = self.jit(write, (self._cache_specs, self._cache_specs, everywhere), self._cache_specs, donate_argnums=0)

        def decode(weights, cache, ids_B, padding_B, index):
            logits_BV, new = run(weights, cache, ids_B, padding_B, index)
            return logits_BV, write(cache, new, index)

        return decode

    def _forward(self, weights, ids_BT, rotation, attend):
        """Returns the logits [B, V] of the last index, and what `attend(q, k, v, slot) -> (o, to keep)` keeps in each layer slot."""

        def run(x_BTD, stage):
            kept = []
            for slot, places in enumerate(self.layout.slots_of_stage(self.model.declared["layers"], stage)):
                layer = self.model.layer({name: weights["layers"][name][place][0] for name, place in places.items()})
                x_BTD, new = layer(x_BTD, rotation, functools.partial(attend, slot=slot), tensor.WHOLE_SEQUENCE)
                kept.append(new)
            return x_BTD, kept + [jax.tree.map(jnp.zeros_like, kept[0])] * (self.num_slots - len(kept))

        x_BTD = self.model.embedding(weights["ends"])(ids_BT, tensor.WHOLE_SEQUENCE)
        x_BTD, kept = relay(self.layout.layers_per_stage, run, x_BTD)
        return self._logits(weights, x_BTD[:, -1:])[:, 0], kept

    def _logits(self, weights, x_BTD: jax.Array) -> jax.Array:
        """Returns the logits, FP32 [B, T, V]."""
        head, output_DV = self.model.head(weights["ends"])
        hidden_BTD = head.hidden(x_BTD, tensor.WHOLE_SEQUENCE)
        logits_BTV = jnp.dot(hidden_BTD, weights.get("output", output_DV), preferred_element_type=jnp.float32)
        return collectives.all_gather(logits_BTV, "tp", dim=2)[..., : self.config.vocab_size]

    def _rotation(self, index_T, padding_B):
        positions_BT = jnp.maximum(index_T[None] - padding_B[:, None], 0)
        return self.model.rotation(positions_BT)

    @functools.cached_property
    def weight_specs(self):
        return apart_specs(self.model, self.layout)

    @property
    def _cache_specs(self):
        return [(CACHE_SPEC, CACHE_SPEC)] * self.num_slots

    def jit(self, function, in_specs, out_specs, **options):
        return on_mesh(function, self.layout.mesh, in_specs, out_specs, self.dtype, **options)


def for_cache(k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys [P, B, K, H, T] and values [P, B, K, T, H] of a device (P is 1), as the products of one query read them fastest."""
    return k_BTKH.transpose(0, 2, 3, 1)[None], v_BTKH.swapaxes(1, 2)[None]


def cached_attention(q_BTNH, k_BTKH, v_BTKH, k_PBKHS, v_PBKSH, padding_B: jax.Array, index: jax.Array) -> jax.Array:
    """Computes attention of each row's one query (T = 1) at `index` with the keys padding .. index - 1 of the cache and its own.

    P is 1 on a device. The softmax over both is written out: XLA's CPU backend would copy all scores to put one more beside them.
    """
    B, _, N, H = q_BTNH.shape
    (_, _, K, _, S), own_k_BKTH, own_v_BKTH = k_PBKHS.shape, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    q_BKGH = q_BTNH.reshape(B, K, -1, H) / math.sqrt(H)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    visible_BS = (padding_B[:, None] <= jnp.arange(S)) & (jnp.arange(S) < index)
    scores_BKGS = jnp.where(visible_BS[:, None, None], product(q_BKGH, k_PBKHS[0]), -jnp.inf)
    own_BKGT = jnp.sum(q_BKGH.astype(jnp.float32) * own_k_BKTH, axis=-1, keepdims=True)
    most_BKGT = jnp.maximum(jnp.max(scores_BKGS, axis=-1, keepdims=True), own_BKGT)
    p_BKGS, own_BKGT = jnp.exp(scores_BKGS - most_BKGT), jnp.exp(own_BKGT - most_BKGT)
    total_BKGH = product(p_BKGS.astype(v_PBKSH.dtype), v_PBKSH[0]) + own_BKGT * own_v_BKTH
    o_BKGH = total_BKGH / (jnp.sum(p_BKGS, axis=-1, keepdims=True) + own_BKGT)
    return o_BKGH.reshape(B, 1, N, H).astype(q_BTNH.dtype)
