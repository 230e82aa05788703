"""The dimensions of a Llama, those of the paper and small ones, and which of them a mesh can split."""

import dataclasses

from jax.sharding import Mesh

from herd_jax.config import NOT_GIVEN, NotGiven
from herd_jax.errors import UserError
from herd_jax.mesh import fsdp_size
from herd_jax.models.fp8 import Fp8Config
from herd_jax.models.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Table 3 of the paper and the released configurations."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int = 128_256
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02  # ours: the paper does not say
    fp8: Fp8Config | None = None  # of a quantized model
    reward: bool = False  # of a reward model: its head gives a number for a token, in place of logits

    def __post_init__(self):
        for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"model.num_heads {self.num_heads} does not divide by model.num_kv_heads {self.num_kv_heads}: change one of them")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim {self.head_dim} is odd: RoPE rotates pairs, so it must be even")
        if self.fp8 and not self.fp8.layers(self.num_layers):
            raise UserError(f"model.num_layers is {self.num_layers} and the first and the last are never FP8: leave the model as it is")
        if self.fp8 and self.fp8.activation_bound is not None and not self.fp8.activation_bound > 0:
            raise UserError(f"model.fp8.activation_bound is {self.fp8.activation_bound}: it must be positive")

    @property
    def layer_matrices(self) -> int:
        """Returns the number of parameters of one layer's matmuls."""
        return self.dim * self.head_dim * 2 * (self.num_heads + self.num_kv_heads) + 3 * self.dim * self.ffn_dim

    @property
    def head_matrix(self) -> int:
        """Returns the number of parameters of the output matrix, or of the embedding's table."""
        return self.dim * self.vocab_size

    def flops_per_token(self, keys_seen: float) -> float:
        """Returns the floating-point operations of forward and backward for one token: 6 for each parameter of a matmul (the output matrix is
        one, the embedding's look-up is not) and 12 for each layer, query head, head dim and key that a query sees on average."""
        attention = 12.0 * self.num_heads * self.head_dim * keys_seen
        return self.num_layers * (6.0 * self.layer_matrices + attention) + 6.0 * self.head_matrix

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises UserError where the mesh cannot split the model."""
        tp, fsdp = mesh.shape["tp"], fsdp_size(mesh)
        for name in ("num_kv_heads", "ffn_dim"):
            if getattr(self, name) % tp:
                raise UserError(f"model.{name} {getattr(self, name)} does not divide by mesh.tp {tp}: choose a tp that divides it")
        if self.dim % fsdp:
            raise UserError(
                f"model.dim {self.dim} does not divide by mesh.dp x mesh.cp = {fsdp}, over which FSDP shards the weights: "
                "choose sizes whose product divides it"
            )


SCALING_3_1, SCALING_3_2 = RopeScaling(factor=8.0), RopeScaling(factor=32.0)

MODELS = {
    "llama3-8b": LlamaConfig(4096, 32, 32, 8, 128, 14336, rope_scaling=SCALING_3_1),
    "llama3-70b": LlamaConfig(8192, 80, 64, 8, 128, 28672, rope_scaling=SCALING_3_1),
    "llama3-405b": LlamaConfig(16384, 126, 128, 8, 128, 53248, rope_scaling=SCALING_3_1),
    "llama3.2-1b": LlamaConfig(2048, 16, 32, 8, 64, 8192, rope_scaling=SCALING_3_2, tie_embeddings=True),
    "llama3.2-3b": LlamaConfig(3072, 28, 24, 8, 128, 8192, rope_scaling=SCALING_3_2, tie_embeddings=True),
    "llama-110m": LlamaConfig(768, 12, 12, 4, 64, 2048, vocab_size=32_000, tie_embeddings=True),
    "llama-20m": LlamaConfig(512, 6, 8, 4, 64, 1408, vocab_size=4096),
    "llama-5m": LlamaConfig(256, 6, 8, 4, 32, 704, vocab_size=4096, tie_embeddings=True),
    "llama-tiny": LlamaConfig(64, 4, 4, 2, 16, 128, vocab_size=512),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model by name, with any of its dimensions overridden."""

    name: str = "llama-5m"  # one of the known models (a wrong name lists them); the fields below override it
    dim: int | None = None  # of the residual stream
    num_layers: int | None = None  # Transformer layers
    num_heads: int | None = None  # query heads
    num_kv_heads: int | None = None  # key and value heads; divides num_heads
    head_dim: int | None = None  # of each head; even
    ffn_dim: int | None = None  # hidden dim of the feed-forward
    vocab_size: int | None = None  # rows of the embedding
    rope_theta: float | None = None  # base of RoPE's frequencies
    rope_scaling: RopeScaling | None | NotGiven = NOT_GIVEN  # none: no scaling
    norm_eps: float | None = None  # added to the mean square in RMSNorm
    tie_embeddings: bool | None = None  # whether the output matrix is the embedding's
    init_std: float | None = None  # standard deviation of first weights; those that write to the residual stream have it over sqrt(2 L)
    reward: bool | None = None  # whether the head gives a reward in place of logits

    def resolve(self) -> LlamaConfig:
        """Returns the dimensions of the named model with the overrides. Raises UserError for an unknown name or impossible dimensions."""
        if self.name not in MODELS:
            raise UserError(f"model.name '{self.name}' is not known: choose one of {', '.join(MODELS)}, and override its dimensions if need be")
        overrides = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("name", "rope_scaling") and value is not None}
        if self.rope_scaling is not NOT_GIVEN:
            overrides["rope_scaling"] = self.rope_scaling
        return dataclasses.replace(MODELS[self.name], **overrides)
