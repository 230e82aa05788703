"""A bidirectional Transformer encoder with a linear head over classes, on one device: what a classifier of documents is made of.

The paper uses DistilRoBERTa (section 3.1.1); this one has its shape and this project's parts: pre-norm, RMSNorm, RoPE, GELU, mean pooling.
Legend: B texts, T tokens, D dim, N heads, H head dim, F ffn dim, C classes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from herd_jax.errors import UserError
from herd_jax.models.attention.attention import attention
from herd_jax.models.layers import look_up, rms_norm
from herd_jax.models.params import bind, declarations, declare, normal, ones
from herd_jax.models.products import project
from herd_jax.models.rope import frequencies, rotate, rotations


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """DistilRoBERTa is dim 768, 6 layers, 12 heads, ffn 3072, vocabulary 50,265, 512 tokens."""

    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 1024
    vocab_size: int = 8192
    max_tokens: int = 512  # of a text, from its beginning
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("dim", "num_layers", "num_heads", "ffn_dim", "vocab_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"encoder.{name} is {getattr(self, name)}: it must be 1 or more")
        if self.dim % (2 * self.num_heads):
            raise UserError(f"encoder.dim {self.dim} must be an even multiple of encoder.num_heads {self.num_heads}: RoPE rotates pairs")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


class Ends(nnx.Module):
    """The embedding before the layers; the norm, the pooling and the head after them."""

    def __init__(self, config: EncoderConfig, num_classes: int):
        self.config = config
        self.table = declare((config.vocab_size, config.dim), (None, None), normal(config.init_std))
        self.norm = declare((config.dim,), (None,), ones)
        self.classes = declare((config.dim, num_classes), (None, None), normal(config.init_std))

    def embed(self, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
        return look_up(self.table[...], tokens_BT, real_BT)

    def classify(self, x_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
        hidden_BTD = rms_norm(x_BTD, self.norm[...], self.config.norm_eps).astype(jnp.float32)
        sum_BD = jnp.sum(hidden_BTD * real_BT[..., None], axis=1)
        mean_BD = sum_BD / jnp.maximum(real_BT.sum(1), 1)[:, None]
        return mean_BD @ self.classes[...].astype(jnp.float32)


class EncoderLayer(nnx.Module):
    def __init__(self, config: EncoderConfig, attention_implementation: str):
        c, into_residual = config, config.init_std / math.sqrt(2 * config.num_layers)
        self.config, self.attention_implementation = c, attention_implementation
        self.attention_norm = declare((c.dim,), (None,), ones)
        self.qkv = declare((c.dim, c.num_heads, 3, c.head_dim), (None, None, None, None), normal(c.init_std))
        self.out = declare((c.num_heads, c.head_dim, c.dim), (None, None, None), normal(into_residual))
        self.ffn_norm = declare((c.dim,), (None,), ones)
        self.up = declare((c.dim, c.ffn_dim), (None, None), normal(c.init_std))
        self.down = declare((c.ffn_dim, c.dim), (None, None), normal(into_residual))

    def __call__(self, x_BTD: jax.Array, cos_BTh, sin_BTh, start_BT, end_BT) -> jax.Array:
        eps = self.config.norm_eps
        qkv = project(rms_norm(x_BTD, self.attention_norm[...], eps), self.qkv[...])  # [B, T, N, 3, H]
        qk, v_BTNH = rotate(qkv[..., :2, :], cos_BTh, sin_BTh), qkv[..., 2, :]
        o_BTNH = attention(qk[..., 0, :], qk[..., 1, :], v_BTNH, ((start_BT, end_BT),), self.attention_implementation)
        x_BTD += o_BTNH.reshape(x_BTD.shape) @ self.out[...].reshape(-1, x_BTD.shape[-1])
        return x_BTD + project(jax.nn.gelu(project(rms_norm(x_BTD, self.ffn_norm[...], eps), self.up[...])), self.down[...])


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The encoder: `declared` has the declarations of its parameters, {"ends": ..., "layers": ...}, the latter stacked by layer."""

    config: EncoderConfig
    graphs: dict[str, nnx.GraphDef]
    declared: dict[str, dict]

    @classmethod
    def make(cls, config: EncoderConfig, num_classes: int, attention_implementation: str = "dense") -> "Encoder":
        ends_graph, ends = declarations(Ends(config, num_classes))
        layer_graph, layers = declarations(EncoderLayer(config, attention_implementation), range(config.num_layers))
        return cls(config, {"ends": ends_graph, "layer": layer_graph}, {"ends": ends, "layers": layers})

    def logits(self, params, tokens_BT: jax.Array, num_tokens_B: jax.Array) -> jax.Array:
        """Returns the logits, FP32 [B, C], from the first `num_tokens_B` tokens of each row; the others have no influence.

        A row of 0 tokens gives zeros.
        """
        index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        real_BT = index_BT < num_tokens_B[:, None]
        cos_BTh, sin_BTh = rotations(index_BT, frequencies(self.config.head_dim, self.config.rope_theta, None))
        start_BT, end_BT = jnp.zeros_like(index_BT), jnp.broadcast_to(num_tokens_B[:, None], tokens_BT.shape)

        def layer(x_BTD, weights):
            return bind(self.graphs["layer"], weights)(x_BTD, cos_BTh, sin_BTh, start_BT, end_BT), None

        ends = bind(self.graphs["ends"], params["ends"])
        x_BTD, _ = jax.lax.scan(layer, ends.embed(tokens_BT, real_BT), params["layers"])
        return ends.classify(x_BTD, real_BT)
