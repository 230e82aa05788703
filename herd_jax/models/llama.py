"""The Llama 3 architecture: pre-norm Transformer with grouped-query attention, RoPE, SwiGLU and RMSNorm (section 3.2 of the paper).

Modules declare parameters and the math on one device's share of them; `program` hands the math to the pipeline. Training, scoring and
decoding call the same layer: the caller says what queries attend to, and how tp ranks communicate between blocks.
Legend: B sequences in a micro-batch, T one device's tokens of a sequence, S all its tokens, D model dim, N query heads, K kv heads, G = N / K,
H head dim, F ffn dim, V vocabulary, L layers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from herd_jax.errors import UserError
from herd_jax.models import fp8
from herd_jax.models.attention.attention import attention
from herd_jax.models.config import LlamaConfig
from herd_jax.models.layers import look_up, recompute, rms_norm
from herd_jax.models.params import bind, declarations, declare, normal, ones, stacked
from herd_jax.models.products import project_gathered, project_reduced
from herd_jax.models.rope import frequencies, rotate, rotations
from herd_jax.parallel import collectives, context, tensor
from herd_jax.parallel.pipeline import Program

REMAT = ("none", "attention", "layer")

PyTree = Any
Rotation = tuple[jax.Array, jax.Array]  # cosines and sines of the positions, [B, T, H / 2] each
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, PyTree]]  # (q_BTNH, k_BTKH, v_BTKH) -> (o_BTNH, what is kept)


class Inputs(NamedTuple):
    """What the model reads of a device's T tokens of B sequences, in zigzag order; all tp and pp ranks have the same."""

    tokens_BT: jax.Array
    rotation: Rotation
    ranges: tuple[tuple[jax.Array, jax.Array], ...]  # each query sees the keys start .. end - 1 of the row, of each range


class MicroBatch(NamedTuple):
    """The model's inputs, and what the objective reads: the batch's fields, [B, T] with a value for each token or [B] with one for each row."""

    inputs: Inputs
    fields: dict[str, jax.Array]


class Embedding(nnx.Module):
    def __init__(self, config: LlamaConfig):
        self.table = declare((config.vocab_size, config.dim), ("vocab", "embed"), normal(config.init_std))

    def __call__(self, tokens_BT: jax.Array, between: tensor.Between) -> jax.Array:
        index_BT, mine_BT = tensor.vocabulary_slice(tokens_BT, self.table.shape[0])
        return between.reduce(look_up(self.table[...], index_BT, mine_BT))


class Layer(nnx.Module):
    """q, k and v lie together by kv head, and so do gate and up, so that each pair of projections is one matmul on any tp."""

    def __init__(self, config: LlamaConfig):
        c, into_residual = config, config.init_std / math.sqrt(2 * config.num_layers)
        self.config = c
        group = c.num_heads // c.num_kv_heads
        self.attention_norm = declare((c.dim,), (None,), ones)
        self.qkv = declare((c.dim, c.num_kv_heads, group + 2, c.head_dim), ("embed", "kv_heads", None, None), normal(c.init_std))
        self.out = declare((c.num_kv_heads, group, c.head_dim, c.dim), ("kv_heads", None, None, "embed"), normal(into_residual))
        self.ffn_norm = declare((c.dim,), (None,), ones)
        self.gate_up = declare((c.dim, 2, c.ffn_dim), ("embed", None, "ffn"), normal(c.init_std))
        self.down = declare((c.ffn_dim, c.dim), ("ffn", "embed"), normal(into_residual))

    def __call__(self, x_BTD: jax.Array, rotation: Rotation, attend: Attend, between: tensor.Between) -> tuple[jax.Array, PyTree]:
        """Returns the activations, and what `attend` keeps."""
        x_BTD, kept = self.attention_block(x_BTD, rotation, attend, between)
        return self.feed_forward_block(x_BTD, between), kept

    def attention_block(self, x_BTD: jax.Array, rotation: Rotation, attend: Attend, between: tensor.Between) -> tuple[jax.Array, PyTree]:
        """Returns the activations, and what `attend` keeps."""
        weights = self.attention_norm[...], self.qkv[...]
        qkv = recompute(lambda x, *w: self.norm_and_project(x, *w, between))(x_BTD, *weights)  # [B, T, K, G + 2, H]
        group = qkv.shape[-2] - 2
        qk, v = jnp.split(qkv, [group + 1], axis=-2)  # the gradient of a split is one concatenation, that of slices pads each
        q, k = jnp.split(recompute(rotate)(qk, *rotation), [group], axis=-2)
        q_BTNH, k_BTKH, v_BTKH = q.reshape(*q.shape[:2], -1, q.shape[-1]), k[..., 0, :], v[..., 0, :]
        o_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH)
        return x_BTD + recompute(lambda o, w: self.project_out(o, w, between))(o_BTNH, self.out[...]), kept

    def feed_forward_block(self, x_BTD: jax.Array, between: tensor.Between) -> jax.Array:
        weights = self.ffn_norm[...], self.gate_up.get_value()
        gate_up = recompute(lambda x, *w: self.norm_and_project(x, *w, between))(x_BTD, *weights)  # [B, T, 2, F]
        return x_BTD + recompute(lambda g, w: self.swiglu(g, w, between))(gate_up, self.down.get_value())

    def norm_and_project(self, x_BTD, norm_D, weight, between: tensor.Between):
        return project_gathered(rms_norm(x_BTD, norm_D, self.config.norm_eps), weight, between)

    @staticmethod
    def project_out(o_BTNH, out_KGHD, between: tensor.Between):
        o_BTE = o_BTNH.reshape(*o_BTNH.shape[:2], -1)
        return project_reduced(o_BTE, out_KGHD.reshape(o_BTE.shape[-1], -1), between)

    @staticmethod
    def swiglu(gate_up_BT2F, down_FD, between: tensor.Between):
        gate_BTF, up_BTF = (half[:, :, 0] for half in jnp.split(gate_up_BT2F, 2, axis=2))
        return project_reduced(jax.nn.silu(gate_BTF) * up_BTF, down_FD, between)


class Fp8FeedForward(nnx.Module):
    """What an FP8 layer stores in place of gate_up and down: values, which products read fastest as [out, in], and a scale for each output."""

    def __init__(self, config: LlamaConfig):
        D, F = config.dim, config.ffn_dim
        self.gate_up_fp8 = declare((2, F, D), (None, "ffn", "embed"), ones, fp8.DTYPE)
        self.gate_up_scales = declare((2, F), (None, "ffn"), ones, jnp.float32)
        self.down_fp8 = declare((D, F), ("embed", "ffn"), ones, fp8.DTYPE)
        self.down_scales = declare((D,), ("embed",), ones, jnp.float32)


class Head(nnx.Module):
    """The final norm, and the output matrix unless it is the embedding's; of a reward model the weights of the reward, of which each tp rank has a
    part."""

    def __init__(self, config: LlamaConfig):
        self.config = config
        self.norm = declare((config.dim,), (None,), ones)
        if config.reward:
            self.reward = declare((config.dim,), ("reward",), normal(config.init_std))
        elif not config.tie_embeddings:
            self.output = declare((config.dim, config.vocab_size), ("embed", "vocab"), normal(config.init_std))

    def hidden(self, x_BTD: jax.Array, between: tensor.Between) -> jax.Array:
        return between.gather(rms_norm(x_BTD, self.norm[...], self.config.norm_eps))


@dataclasses.dataclass(frozen=True)
class Llama:
    """The model on a mesh: declarations of its parameters, and the math that the pipeline runs.

    `declared` is {"ends": {"embed": ..., "head": ...}, "layers": ...}: the weights outside the layers, and those stacked by layer.
    """

    config: LlamaConfig
    attention_implementation: str
    remat: str
    graphs: dict[str, nnx.GraphDef]
    declared: dict[str, dict]

    @classmethod
    def make(cls, config: LlamaConfig, attention_implementation: str = "dense", remat: str = "none") -> "Llama":
        if remat not in REMAT:
            raise UserError(f"train.remat is '{remat}': it must be one of {', '.join(REMAT)}")
        embed_graph, embed = declarations(Embedding(config))
        layer_graph, layers = declarations(Layer(config), range(config.num_layers))
        head_graph, head = declarations(Head(config))
        if config.fp8:
            quantized = config.fp8.layers(config.num_layers)
            plain = [layer for layer in range(config.num_layers) if layer not in quantized]
            feed_forward = stacked({name: layers.pop(name) for name in ("gate_up", "down")}, plain)
            layers |= (feed_forward if plain else {}) | declarations(Fp8FeedForward(config), quantized)[1]
        graphs = {"embed": embed_graph, "layer": layer_graph, "head": head_graph}
        return cls(config, attention_implementation, remat, graphs, {"ends": {"embed": embed, "head": head}, "layers": layers})

    def embedding(self, ends: dict) -> Embedding:
        return bind(self.graphs["embed"], ends["embed"])

    def layer(self, weights: dict[str, jax.Array]) -> Layer:
        """Returns a layer with its stored weights; FP8 values and their scales become one matrix."""
        if "gate_up_fp8" in weights:
            quantize = lambda name, axis: fp8.Fp8Matrix(weights[f"{name}_fp8"], weights[f"{name}_scales"], self.config.fp8.activation_bound, axis)
            kept = {name: value for name, value in weights.items() if not name.endswith(("_fp8", "_scales"))}
            weights = {**kept, "gate_up": quantize("gate_up", None), "down": quantize("down", "tp")}
        return bind(self.graphs["layer"], weights)

    def head(self, ends: dict) -> tuple[Head, jax.Array]:
        """Returns the head and this rank's part of the output matrix [D, V], or of the weights of the reward [D]."""
        module = bind(self.graphs["head"], ends["head"])
        if self.config.reward:
            return module, module.reward[...]
        return module, ends["embed"]["table"].T if self.config.tie_embeddings else module.output[...]

    def program(self, layers_per_stage: tuple[int, ...], objective) -> Program:
        """Returns the pipeline's program, whose head computes `objective(hidden_BTD, output_DV, fields of the micro-batch) -> (scalar, sums)`."""
        between = tensor.split_sequence()

        def embed(ends, batch: MicroBatch):
            return self.embedding(ends)(batch.inputs.tokens_BT, between)

        def layer(weights, x_BTD, batch: MicroBatch):
            module, inputs = self.layer(weights), batch.inputs

            def attend(q_BTNH, k_BTKH, v_BTKH):
                k_BSKH, v_BSKH = context.gather_keys(k_BTKH, 1), context.gather_keys(v_BTKH, 1)
                promises = {"causal_rows": collectives.axis_size("cp") == 1, "all_see": True}  # `visible_ranges`: each token sees itself
                return attention(q_BTNH, k_BSKH, v_BSKH, inputs.ranges, self.attention_implementation, **promises), None

            attention_block = lambda x_BTD: module.attention_block(x_BTD, inputs.rotation, attend, between)[0]
            attention_block = recompute(attention_block) if self.remat == "attention" else attention_block
            block = lambda x_BTD: module.feed_forward_block(attention_block(x_BTD), between)
            return recompute(block)(x_BTD) if self.remat == "layer" else block(x_BTD)

        def head(ends, x_BTD, batch: MicroBatch):
            module, output_DV = self.head(ends)
            return objective(module.hidden(x_BTD, between), output_DV, batch.fields)

        head_keys = ("embed", "head") if self.config.tie_embeddings and not self.config.reward else ("head",)
        return Program(embed, layer, head, ("embed",), head_keys, layers_per_stage)

    def micro_batches(self, batch: dict[str, jax.Array]) -> MicroBatch:
        """Returns the micro-batches of one device's share of a batch, whose fields are [M, B, T] (for tokens) or [M, B] (for rows).

        The batch has tokens, segment_ids and positions for the model, and may have branch_ids (`context.visible_ranges`).
        """
        ranges = context.visible_ranges(batch["segment_ids"], batch.get("branch_ids"))
        return MicroBatch(Inputs(batch["tokens"], self.rotation(batch["positions"]), ranges), batch)

    def rotation(self, positions: jax.Array) -> Rotation:
        """Returns RoPE's cosines and sines of positions [..., T]."""
        return rotations(positions, frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling))
