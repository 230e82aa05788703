"""How our parameters lie in the tensors of other formats, declared once for reading and writing.

Parameters are named by their path in the declaration: "ends.embed.table", "layers.qkv". Each is one tensor of a file, or a few concatenated;
other formats store projections as [out, in], all heads in one dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from herd_jax.errors import UserError
from herd_jax.models.config import LlamaConfig
from herd_jax.models.llama import Llama
from herd_jax.models.params import Declaration, is_declaration, parameter_name


@functools.cache
def parameters(config: LlamaConfig) -> dict[str, Declaration]:
    """Returns the declarations of a model by name, in the order in which files have them."""
    paths, _ = jax.tree_util.tree_flatten_with_path(Llama.make(config).declared, is_leaf=is_declaration)
    return {parameter_name(path): declaration for path, declaration in paths}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of a file, of `shape`. Its dims split up to `split` and permuted by `order` are those of our parameter. Where
    `adjacent_pairs`, RoPE rotates the dims 2i and 2i + 1 of its heads (dim -2 of `split`); ours are i and i + H / 2."""

    tensor: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    adjacent_pairs: bool = False

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(np.argsort(self.order))

    def to_ours(self, read: Callable[[tuple[slice, ...]], np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
        """Returns what `index`, in our dims, takes of the tensor; a view of it where possible. `read(slices)` gives a part of the tensor, and is
        asked for no more than the rows and columns that `index` needs."""
        slices, split, rest = self._cut(tuple(index[dim] for dim in self.inverse))
        array = read(slices).reshape(split)[rest]
        if self.adjacent_pairs:
            array = _reorder_pairs(array, (self.split[-2] // 2, 2))
        return array.transpose(self.order)

    def _cut(self, index: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[int, ...], tuple[slice, ...]]:
        """Returns, for an `index` of the split dims: the slices of the tensor's own dims that hold it, how what they take is split, and what is to
        be taken of that. Of the dims that make up one of the tensor's the outermost is cut, so that a slice is enough."""
        slices, split, rest, at = [], list(self.split), list(index), 0
        for size in self.shape:
            covered = 1
            slices.append(slice(None))
            while covered < size:
                covered *= self.split[at]
                if self.split[at] > 1 and slices[-1] == slice(None):
                    inner, part = size // covered, range(self.split[at])[index[at]]
                    slices[-1] = slice(part.start * inner, part.stop * inner)
                    split[at], rest[at] = len(part), slice(None)
                at += 1
        return tuple(slices), tuple(split), tuple(rest)

    def to_file(self, ours: np.ndarray) -> np.ndarray:
        """Returns the whole tensor of the file, contiguous."""
        array = in_c_order(ours.transpose(self.inverse))
        if self.adjacent_pairs:
            array = _reorder_pairs(array, (2, self.split[-2] // 2))
        return array.reshape(self.shape)


def _reorder_pairs(array: np.ndarray, pairs: tuple[int, int]) -> np.ndarray:
    """Swaps the two dims that make up dim -2."""
    return array.reshape(*array.shape[:-2], *pairs, array.shape[-1]).swapaxes(-3, -2).reshape(array.shape)


def in_c_order(array: np.ndarray) -> np.ndarray:
    """Returns the array, contiguous. numpy transposes at a tenth of the memory's speed; jax, on the way to a device, at half of it."""
    return array if array.flags.c_contiguous else np.asarray(jax.device_put(array, jax.local_devices()[0]))


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A parameter: its `pieces` are concatenated along `dim`; they are tensors with "{layer}" in their names if it is a layer's."""

    declaration: Declaration
    pieces: tuple[Piece, ...]
    dim: int = 0

    def split(self, ours: np.ndarray) -> list[np.ndarray]:
        """Splits a layer of the parameter into its pieces."""
        sizes = [piece.split[piece.order[self.dim]] for piece in self.pieces]
        return np.split(ours, np.cumsum(sizes)[:-1], self.dim)


@dataclasses.dataclass(frozen=True)
class Names:
    """What a format calls its tensors ("{layer}" stands for the layer's number), and which pairs of a head's dims RoPE rotates there."""

    embedding: str
    norm: str
    output: str
    attention_norm: str
    query: str
    key: str
    value: str
    out: str
    ffn_norm: str
    gate: str
    up: str
    down: str
    adjacent_pairs: bool
    reward: str | None = None  # None: the format has no reward models

    def map(self, config: LlamaConfig) -> dict[str, Mapped]:
        """Returns the mapping of every parameter of a model. Raises UserError for a reward model where the format has none."""
        if config.reward and self.reward is None:
            raise UserError("this format has no reward models: save it as herd or huggingface")
        c, A = config, self.adjacent_pairs
        D, F, V, K, H = c.dim, c.ffn_dim, c.vocab_size, c.num_kv_heads, c.head_dim
        N, G = c.num_heads, c.num_heads // c.num_kv_heads
        whole = lambda tensor, *shape: Piece(tensor, shape, shape, tuple(range(len(shape))))
        transposed = lambda tensor, *shape: Piece(tensor, shape, shape, (1, 0))
        heads = lambda tensor, group, pairs: Piece(tensor, (K * group * H, D), (K, group, H, D), (3, 0, 1, 2), pairs)
        half = lambda tensor: Piece(tensor, (F, D), (1, F, D), (2, 0, 1))
        rows = lambda tensor: Piece(tensor, (F, D), (1, F, D), (0, 1, 2))
        scales = lambda tensor, *shape: Piece(f"{tensor}_scale", (shape[-1], 1), shape, tuple(range(len(shape))))
        pieces = {
            "ends.embed.table": (whole(self.embedding, V, D),),
            "ends.head.norm": (whole(self.norm, D),),
            "ends.head.output": (transposed(self.output, V, D),),
            "ends.head.reward": (Piece(self.reward or "", (1, D), (D,), (0,)),),
            "layers.attention_norm": (whole(self.attention_norm, D),),
            "layers.qkv": (heads(self.query, G, A), heads(self.key, 1, A), heads(self.value, 1, False)),
            "layers.out": (Piece(self.out, (D, N * H), (D, K, G, H), (1, 2, 3, 0)),),
            "layers.ffn_norm": (whole(self.ffn_norm, D),),
            "layers.gate_up": (half(self.gate), half(self.up)),
            "layers.down": (transposed(self.down, D, F),),
            "layers.gate_up_fp8": (rows(self.gate), rows(self.up)),
            "layers.gate_up_scales": (scales(self.gate, 1, F), scales(self.up, 1, F)),
            "layers.down_fp8": (whole(self.down, D, F),),
            "layers.down_scales": (scales(self.down, D),),
        }
        dims = {"layers.qkv": 2, "layers.gate_up": 1}
        return {name: Mapped(d, pieces[name], dims.get(name, 0)) for name, d in parameters(config).items()}


def walk(mapping: dict[str, Mapped]) -> Iterator[tuple[str, int | None]]:
    """Yields (name, layer) of every parameter in the order of a file: a parameter's layers follow each other."""
    for name, mapped in mapping.items():
        yield from ((name, layer) for layer in mapped.declaration.layers or [None])


def tensor_shapes(mapping: dict[str, Mapped]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors by name, in the order of `walk`."""
    return {piece.tensor.format(layer=layer): piece.shape for name, layer in walk(mapping) for piece in mapping[name].pieces}


def tensor_dtypes(mapping: dict[str, Mapped], dtype: np.dtype) -> dict[str, np.dtype]:
    """Returns the dtypes of all tensors by name: `dtype` where the parameter has none of its own."""
    own = lambda name: mapping[name].declaration.dtype or dtype
    return {piece.tensor.format(layer=layer): own(name) for name, layer in walk(mapping) for piece in mapping[name].pieces}


def tensor_bytes(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, np.dtype]) -> dict[str, int]:
    return {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}


HUGGING_FACE = Names(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    output="lm_head.weight",
    attention_norm="model.layers.{layer}.input_layernorm.weight",
    query="model.layers.{layer}.self_attn.q_proj.weight",
    key="model.layers.{layer}.self_attn.k_proj.weight",
    value="model.layers.{layer}.self_attn.v_proj.weight",
    out="model.layers.{layer}.self_attn.o_proj.weight",
    ffn_norm="model.layers.{layer}.post_attention_layernorm.weight",
    gate="model.layers.{layer}.mlp.gate_proj.weight",
    up="model.layers.{layer}.mlp.up_proj.weight",
    down="model.layers.{layer}.mlp.down_proj.weight",
    adjacent_pairs=False,
    reward="score.weight",
)
META = Names(
    embedding="tok_embeddings.weight",
    norm="norm.weight",
    output="output.weight",
    attention_norm="layers.{layer}.attention_norm.weight",
    query="layers.{layer}.attention.wq.weight",
    key="layers.{layer}.attention.wk.weight",
    value="layers.{layer}.attention.wv.weight",
    out="layers.{layer}.attention.wo.weight",
    ffn_norm="layers.{layer}.ffn_norm.weight",
    gate="layers.{layer}.feed_forward.w1.weight",
    up="layers.{layer}.feed_forward.w3.weight",
    down="layers.{layer}.feed_forward.w2.weight",
    adjacent_pairs=True,
)
GGUF = Names(
    embedding="token_embd.weight",
    norm="output_norm.weight",
    output="output.weight",
    attention_norm="blk.{layer}.attn_norm.weight",
    query="blk.{layer}.attn_q.weight",
    key="blk.{layer}.attn_k.weight",
    value="blk.{layer}.attn_v.weight",
    out="blk.{layer}.attn_output.weight",
    ffn_norm="blk.{layer}.ffn_norm.weight",
    gate="blk.{layer}.ffn_gate.weight",
    up="blk.{layer}.ffn_up.weight",
    down="blk.{layer}.ffn_down.weight",
    adjacent_pairs=True,
)
