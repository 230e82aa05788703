"""An engine for a model: its settings, and whether it fits into the memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from herd_jax.errors import UserError
from herd_jax.inference.engine.engine import Engine, bucket
from herd_jax.inference.engine.layout import PageLayout
from herd_jax.inference.engine.programs import Programs
from herd_jax.inference.engine.replicas import Replicas, layouts_of, split_weights
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout, is_declaration
from herd_jax.text.tokenizer import Tokenizer

UNKNOWN_LENGTH = 4096  # tokens of a sequence, where the model's context is not known
ON_CPU = {"max_sequences": 32, "chunk_tokens": 256, "memory_share": 0.25}
ON_ACCELERATORS = {"max_sequences": 128, "chunk_tokens": 2048, "memory_share": 0.85}


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The settings of an engine; None: what suits the machine."""

    max_tokens_in_cache: int | None = None  # whose keys and values are held; None: a share of the free memory
    max_sequences: int | None = None  # answers that are computed at the same time
    max_length: int | None = None  # tokens of a prompt and its answer; None: the model's context
    page_size: int = 64  # tokens of a page: what is shared is whole pages
    chunk_tokens: int | None = None  # of prompts, computed between two decode steps
    reserve: bool = True  # admit a request when there is room for its greatest length; false: as it grows
    guesses: int = 0  # tokens guessed at each step, by looking up what followed the last two before; 0: none
    micro_batches: int | None = None  # that go through a pipeline at the same time; None: one for each rank
    strict: bool = False  # one shape of step: each answer's bits are the same whatever else is computed beside it

    def __post_init__(self) -> None:
        for name in ("max_tokens_in_cache", "max_sequences", "max_length", "page_size", "chunk_tokens", "micro_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be 1 or more")
        if not 0 <= self.guesses <= 16:
            raise UserError(f"guesses is {self.guesses}: it must be from 0, which guesses nothing, to 16")
        if self.strict and not self.reserve:
            raise UserError("strict needs reserve, since what is computed twice may differ in its last bits: leave one of them out")


def make_engine(
    model: Llama, layout: Layout, dtype: jnp.dtype, weights, tokenizer: Tokenizer | None, context_length: int | None, config: EngineConfig
) -> Engine | Replicas:
    """Returns an engine; over dp one for each replica, behind one front. Raises UserError for a cache that does not fit."""
    if layout.mesh.shape["dp"] > 1 and jax.process_count() == 1:
        parts = layouts_of(layout)
        engines = [_make(model, part, dtype, tokenizer, context_length, config, len(parts)) for part in parts]
        engine = Replicas(engines, functools.partial(split_weights, model, layout))
    else:
        engine = _make(model, layout, dtype, tokenizer, context_length, config, 1)
    engine.hold(weights)
    return engine


def _make(model, layout, dtype, tokenizer, context_length, config: EngineConfig, num_replicas: int) -> Engine:
    defaults = ON_CPU if layout.mesh.devices.flat[0].platform == "cpu" else ON_ACCELERATORS
    longest = context_length or UNKNOWN_LENGTH
    max_length = config.max_length or longest
    if context_length is not None and max_length > context_length:
        raise UserError(f"max_length is {max_length}: the model's context holds {context_length}; set it to that or less")
    num_slots, page_size = config.max_sequences or defaults["max_sequences"], config.page_size
    room = _free_memory(layout) / num_replicas
    per_page = page_size * token_bytes(model, layout, dtype)
    pages = lambda tokens: -(-tokens // page_size)
    wanted = num_slots * pages(max_length)
    most = int(room * (defaults["memory_share"] if config.max_tokens_in_cache is None else 1) / per_page) - 1
    num_pages = min(wanted, most) if config.max_tokens_in_cache is None else pages(config.max_tokens_in_cache)
    if num_pages > most or num_pages < 1:
        raise UserError(_too_large(layout, max(num_pages, 1) * per_page, room))
    chunk_tokens = min(config.chunk_tokens or defaults["chunk_tokens"], bucket(max_length))
    num_ids = tokenizer.vocab_size if tokenizer else None
    programs = Programs(model, layout, dtype, PageLayout(num_pages + 1, page_size), num_ids, config.guesses)
    return Engine(programs, tokenizer, max_length, num_slots, chunk_tokens, config.reserve, config.micro_batches, config.strict)


def token_bytes(model: Llama, layout: Layout, dtype) -> int:
    """Returns the bytes that the keys and values of a token take on each device."""
    config, shape = model.config, layout.mesh.shape
    return 2 * max(1, *layout.layers_per_stage) * config.num_kv_heads // shape["tp"] * config.head_dim * jnp.dtype(dtype).itemsize


def weight_bytes(model: Llama, layout: Layout, dtype) -> int:
    """Returns the bytes that the weights take on each device."""
    shape = layout.mesh.shape
    size = lambda d: d.size * jnp.dtype(d.dtype or dtype).itemsize
    leaves = lambda part: jax.tree.leaves(model.declared[part], is_leaf=is_declaration)
    ends = sum(map(size, leaves("ends"))) * (2 if model.config.tie_embeddings else 1)  # a tied table is held in the order of either product
    return (ends + sum(map(size, leaves("layers"))) // shape["pp"]) // shape["tp"]


def check_weights(model: Llama, layout: Layout, dtype) -> None:
    """Raises UserError where the weights of a model that is not loaded yet do not fit into the free memory."""
    needed, room = weight_bytes(model, layout, dtype), _free_memory(layout)
    if needed > room:
        raise UserError(_too_large(layout, needed, room, "the weights take", model, dtype))


def _too_large(layout: Layout, needed: float, room: float, what: str = "the cache takes", model: Llama | None = None, dtype=None) -> str:
    gigabytes = lambda size: f"{size / 1e9:.2f} GB"
    text = f"{what} {gigabytes(needed)} on each device and {gigabytes(room)} are free, {gigabytes(needed - room)} too little: "
    parts = 2 ** math.ceil(math.log2(needed / max(room, 1)))
    shape, on_cpu = layout.mesh.shape, layout.mesh.devices.flat[0].platform == "cpu"
    ways = [] if on_cpu else [f"tp {shape['tp'] * parts}", f"pp {shape['pp'] * parts}"]
    if model is None:
        return text + " or ".join([*(f"use {way}" for way in ways[:1]), "give a smaller max_tokens_in_cache or max_length"])
    if model.config.fp8 is None and jnp.dtype(dtype).itemsize == 2:
        ways.append("FP8 weights (python -m herd_jax.quantize)")
    elif jnp.dtype(dtype).itemsize == 4:
        ways.append("dtype bfloat16")
    return text + (f"use {', or '.join(ways)}" if ways else "load a smaller model")


def _free_memory(layout: Layout) -> float:
    """Returns the bytes that are free for each device: on a CPU, whose devices share it, a part of the host's."""
    device = layout.mesh.local_devices[0]
    if device.platform != "cpu" and (stats := device.memory_stats()):
        return stats["bytes_limit"] - stats["bytes_in_use"]
    with open("/proc/meminfo") as file:
        values = {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in file)}
    return values["MemAvailable"] / len(layout.mesh.local_devices)
