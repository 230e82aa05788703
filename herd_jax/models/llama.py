"""The Llama 3 architecture: pre-norm Transformer with grouped-query attention, RoPE, SwiGLU and RMSNorm (section 3.2 of the paper).

Modules declare parameters and the math on one device's share of them; `program` hands the math to the pipeline.
Legend: B sequences in a micro-batch, T one device's tokens of a sequence, S all of it, D model dim, N query heads, K kv heads, G = N / K,
H head dim, F ffn dim, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from herd_jax.errors import UserError
from herd_jax.models import fp8
from herd_jax.models.attention.attention import attention
from herd_jax.models.config import LlamaConfig
from herd_jax.models.params import Declaration, bind, declarations, declare, normal, ones
from herd_jax.models.rope import frequencies, rotate, rotations
from herd_jax.parallel import collectives, context, tensor
from herd_jax.parallel.pipeline import Program

REMAT = ("none", "attention", "layer")

# Recomputes cheap operations in the backward rather than keep their results. Forward and backward are apart, so XLA has nothing to undo.
recompute = functools.partial(jax.checkpoint, prevent_cse=False)


class MicroBatch(NamedTuple):
    """What a device needs of its T tokens of B sequences, in zigzag order; all tp and pp ranks have the same."""

    tokens_BT: jax.Array
    targets_BT: jax.Array
    loss_mask_BT: jax.Array
    cos_BTh: jax.Array
    sin_BTh: jax.Array
    start_BT: jax.Array  # each query sees the keys start .. end - 1 of the row
    end_BT: jax.Array


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Normalised in FP32, then cast, then weighted. The last product is written in FP32 (it rounds to the same), so that the weight's
    gradient, a sum over all tokens, is accumulated in FP32."""
    x32 = x_BTD.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    cast = (x32 * scale).astype(x_BTD.dtype)
    return (cast.astype(jnp.float32) * weight_D.astype(jnp.float32)).astype(x_BTD.dtype)


@jax.custom_vjp
def look_up(table_VD: jax.Array, index_BT: jax.Array, mine_BT: jax.Array) -> jax.Array:
    """Rows of the table, 0 where not `mine`. A token that occurs often has its gradient summed in FP32."""
    return jnp.where(mine_BT[..., None], table_VD[index_BT], 0)


def _look_up_forward(table_VD, index_BT, mine_BT):
    return look_up(table_VD, index_BT, mine_BT), (table_VD, index_BT, mine_BT)


def _look_up_backward(residuals, dx_BTD):
    table_VD, index_BT, mine_BT = residuals
    dx_BTD = jnp.where(mine_BT[..., None], dx_BTD.astype(jnp.float32), 0)
    return jnp.zeros(table_VD.shape, jnp.float32).at[index_BT].add(dx_BTD).astype(table_VD.dtype), None, None


look_up.defvjp(_look_up_forward, _look_up_backward)


def project(x_BTD: jax.Array, weight: jax.Array) -> jax.Array:
    """[B, T, D] by [D, ...] -> [B, T, ...]"""
    return (x_BTD @ weight.reshape(weight.shape[0], -1)).reshape(*x_BTD.shape[:2], *weight.shape[1:])


class Embedding(nnx.Module):
    def __init__(self, config: LlamaConfig):
        self.table = declare((config.vocab_size, config.dim), ("vocab", "embed"), normal(config.init_std))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        index_BT, mine_BT = tensor.vocabulary_slice(tokens_BT, self.table.shape[0])
        return tensor.scatter_sequence(look_up(self.table[...], index_BT, mine_BT))


class Layer(nnx.Module):
    """q, k and v lie together by kv head, and so do gate and up, so that each pair of projections is one matmul on any tp."""

    def __init__(self, config: LlamaConfig, attention_implementation: str, remat: str):
        c, into_residual = config, config.init_std / math.sqrt(2 * config.num_layers)
        self.config, self.attention_implementation, self.remat = c, attention_implementation, remat
        group = c.num_heads // c.num_kv_heads
        self.attention_norm = declare((c.dim,), (None,), ones)
        self.qkv = declare((c.dim, c.num_kv_heads, group + 2, c.head_dim), ("embed", "kv_heads", None, None), normal(c.init_std))
        self.out = declare((c.num_kv_heads, group, c.head_dim, c.dim), ("kv_heads", None, None, "embed"), normal(into_residual))
        self.ffn_norm = declare((c.dim,), (None,), ones)
        self.gate_up = declare((c.dim, 2, c.ffn_dim), ("embed", None, "ffn"), normal(c.init_std))
        self.down = declare((c.ffn_dim, c.dim), ("ffn", "embed"), normal(into_residual))

    def __call__(self, x_BTD: jax.Array, batch: MicroBatch) -> jax.Array:
        attend = recompute(self.attend) if self.remat == "attention" else self.attend
        block = lambda x_BTD: self.feed_forward(attend(x_BTD, batch))
        return recompute(block)(x_BTD) if self.remat == "layer" else block(x_BTD)

    def attend(self, x_BTD: jax.Array, batch: MicroBatch) -> jax.Array:
        qkv = recompute(self.norm_and_project)(x_BTD, self.attention_norm[...], self.qkv[...])  # [B, T, K, G + 2, H]
        qk, v_BTKH = recompute(rotate)(qkv[..., :-1, :], batch.cos_BTh, batch.sin_BTh), qkv[..., -1, :]
        q_BTNH, k_BTKH = qk[..., :-1, :].reshape(*qk.shape[:2], -1, qk.shape[-1]), qk[..., -1, :]
        k_BSKH, v_BSKH = context.gather_keys(k_BTKH, 1), context.gather_keys(v_BTKH, 1)
        o_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, batch.start_BT, batch.end_BT, self.attention_implementation,
                           causal_rows=collectives.axis_size("cp") == 1)  # fmt: skip
        return x_BTD + tensor.scatter_sequence(recompute(self.project_out)(o_BTNH, self.out[...]))

    def feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        gate_up = recompute(self.norm_and_project)(x_BTD, self.ffn_norm[...], self.gate_up[...])  # [B, T, 2, F]
        return x_BTD + tensor.scatter_sequence(recompute(self.swiglu)(gate_up, self.down[...]))

    def norm_and_project(self, x_BTD, norm_D, weight):
        return project(self.norm_and_gather(x_BTD, norm_D), weight)

    def norm_and_gather(self, x_BTD, norm_D):
        return tensor.gather_sequence(rms_norm(x_BTD, norm_D, self.config.norm_eps))

    @staticmethod
    def project_out(o_BTNH, out_KGHD):
        o_BTE = o_BTNH.reshape(*o_BTNH.shape[:2], -1)
        return o_BTE @ out_KGHD.reshape(o_BTE.shape[-1], -1)

    @staticmethod
    def swiglu(gate_up_BT2F, down_FD):
        return (jax.nn.silu(gate_up_BT2F[:, :, 0]) * gate_up_BT2F[:, :, 1]) @ down_FD


class Fp8Layer(Layer):
    """A layer with an FP8 feed-forward, for a forward alone. In place of gate_up and down there are values, which the products read fastest as
    [out, in], and a scale for each output."""

    def __init__(self, config: LlamaConfig, attention_implementation: str):
        super().__init__(config, attention_implementation, "none")
        del self.gate_up, self.down
        D, F = config.dim, config.ffn_dim
        self.gate_up_fp8 = declare((2, F, D), (None, "ffn", "embed"), ones, fp8.DTYPE)
        self.gate_up_scales = declare((2, F), (None, "ffn"), ones, jnp.float32)
        self.down_fp8 = declare((D, F), ("embed", "ffn"), ones, fp8.DTYPE)
        self.down_scales = declare((D,), ("embed",), ones, jnp.float32)

    def feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        weights = self.gate_up_fp8[...], self.gate_up_scales[...], self.down_fp8[...], self.down_scales[...]
        hidden_BTD = self.norm_and_gather(x_BTD, self.ffn_norm[...])
        return x_BTD + tensor.scatter_sequence(fp8.fp8_feed_forward(hidden_BTD, *weights, self.config.fp8.activation_bound))


class Head(nnx.Module):
    """The final norm, and the output matrix unless it is the embedding's."""

    def __init__(self, config: LlamaConfig):
        self.config = config
        self.norm = declare((config.dim,), (None,), ones)
        if not config.tie_embeddings:
            self.output = declare((config.dim, config.vocab_size), ("embed", "vocab"), normal(config.init_std))

    def hidden(self, x_BTD: jax.Array) -> jax.Array:
        return tensor.gather_sequence(rms_norm(x_BTD, self.norm[...], self.config.norm_eps))


@dataclasses.dataclass(frozen=True)
class Llama:
    """The model on a mesh: declarations of its parameters, and the math that the pipeline runs.

    `declared` is {"ends": {"embed": ..., "head": ...}, "layers": ...}: the weights outside the layers, and those stacked by layer.
    """

    config: LlamaConfig
    graphs: dict[str, nnx.GraphDef]
    declared: dict[str, dict]

    @classmethod
    def make(cls, config: LlamaConfig, attention_implementation: str = "dense", remat: str = "none") -> "Llama":
        if remat not in REMAT:
            raise UserError(f"train.remat is '{remat}': it must be one of {', '.join(REMAT)}")
        embed_graph, embed = declarations(Embedding(config))
        layer_graph, layers = declarations(Layer(config, attention_implementation, remat), config.num_layers)
        head_graph, head = declarations(Head(config))
        graphs = {"embed": embed_graph, "layer": layer_graph, "head": head_graph}
        if config.fp8:
            graphs["fp8_layer"], fp8_layers = declarations(Fp8Layer(config, attention_implementation), config.num_layers)
            layers = _of_some_layers(layers, fp8_layers, config.fp8.layers(config.num_layers))
        return cls(config, graphs, {"ends": {"embed": embed, "head": head}, "layers": layers})

    def program(self, layers_per_stage: tuple[int, ...], objective) -> Program:
        """`objective(hidden_BTD, output_DV, micro-batch) -> (scalar, sums)` says what the head computes."""

        def embed(ends, batch: MicroBatch):
            return bind(self.graphs["embed"], ends["embed"])(batch.tokens_BT)

        def layer(weights, x_BTD, batch: MicroBatch):
            return bind(self.graphs["layer" if "gate_up" in weights else "fp8_layer"], weights)(x_BTD, batch)

        def head(ends, x_BTD, batch: MicroBatch):
            module = bind(self.graphs["head"], ends["head"])
            output_DV = ends["embed"]["table"].T if self.config.tie_embeddings else module.output[...]
            return objective(module.hidden(x_BTD), output_DV, batch)

        head_keys = ("embed", "head") if self.config.tie_embeddings else ("head",)
        return Program(embed, layer, head, ("embed",), head_keys, layers_per_stage)

    def micro_batches(self, tokens, targets, loss_mask, segment_ids, positions) -> MicroBatch:
        """From one device's share of a batch, int32 or bool [M, B, T] each."""
        freqs = frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        cos, sin = jax.vmap(lambda p: rotations(p, freqs))(positions)
        return MicroBatch(tokens, targets, loss_mask, cos, sin, *context.visible_range(segment_ids))


def _of_some_layers(plain: dict[str, Declaration], quantized: dict[str, Declaration], layers: tuple[int, ...]) -> dict[str, Declaration]:
    """The parameters of a model whose `layers` are quantized and whose others are plain."""

    def of(some: tuple[int, ...], declared, others):
        cut = lambda d: dataclasses.replace(d, num_layers=len(some), some_layers=some)
        return {name: declaration if name in others else cut(declaration) for name, declaration in declared.items() if some}

    num_layers = plain["qkv"].num_layers
    rest = tuple(layer for layer in range(num_layers) if layer not in layers)
    return of(rest, plain, quantized) | of(layers, quantized, plain)
