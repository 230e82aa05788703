"""An engine for a model: its settings, and whether it fits into the memory."""

import dataclasses
import functools
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from herd_jax.errors import UserError
from herd_jax.inference.engine.engine import Engine
from herd_jax.inference.engine.gpu_pages import GpuPageLayout
from herd_jax.inference.engine.layout import PageLayout
from herd_jax.inference.engine.programs import Programs
from herd_jax.inference.engine.replicas import Replicas, layouts_of, split_weights
from herd_jax.inference.engine.speculative import Draft
from herd_jax.inference.engine.worker import power_of_two
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
    guesses: int = 0  # tokens guessed at each step, by a draft model or else by looking up what followed the last two before; 0: none
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


class Parts(NamedTuple):
    """A model as an engine needs it; `weights` as `Weights.apart` gives them."""

    model: Llama
    layout: Layout
    dtype: jnp.dtype
    weights: Any
    tokenizer: Tokenizer | None
    context_length: int | None


def make_engine(parts: Parts, config: EngineConfig, draft: Parts | None = None) -> Engine | Replicas:
    """Returns an engine; over dp one for each replica, behind one front. `draft`: a smaller model that guesses, on the same mesh. Raises UserError
    for a cache that does not fit, and a draft that does not belong to the model."""
    if draft is not None:
        _check_draft(parts, draft, config)
    model, layout, dtype, weights, tokenizer, context_length = parts
    if layout.mesh.shape["dp"] > 1 and jax.process_count() == 1:
        own = layouts_of(layout)
        of_draft = layouts_of(draft.layout) if draft else own
        pairs = [(parts._replace(layout=a), draft and draft._replace(layout=b)) for a, b in zip(own, of_draft)]
        splits = [functools.partial(split_weights, part.model, part.layout) if part else None for part in (parts, draft)]
        engine = Replicas([_make(*pair, config, len(own)) for pair in pairs], *splits)
    else:
        engine = _make(parts, draft, config, 1)
    engine.hold(weights, draft and draft.weights)
    return engine


def _check_draft(parts: Parts, draft: Parts, config: EngineConfig) -> None:
    if (draft.layout.mesh.devices != parts.layout.mesh.devices).any():
        raise UserError("the draft is on another mesh than the model: load it with the same one")
    if draft.model.config.vocab_size != parts.model.config.vocab_size or (
        draft.tokenizer and parts.tokenizer and draft.tokenizer.fingerprint != parts.tokenizer.fingerprint
    ):
        raise UserError("the draft has other tokens than the model, so its guesses say nothing: choose a draft with the same tokenizer")
    if not config.guesses:
        raise UserError("guesses is 0, so the draft would have nothing to do: set it to the number of tokens that it goes ahead, such as 4")


def _make(parts: Parts, draft: Parts | None, config: EngineConfig, num_replicas: int) -> Engine:
    model, layout, dtype, _, tokenizer, context_length = parts
    defaults = ON_CPU if layout.mesh.devices.flat[0].platform == "cpu" else ON_ACCELERATORS
    longest = context_length or UNKNOWN_LENGTH
    max_length = config.max_length or longest
    if context_length is not None and max_length > context_length:
        raise UserError(f"max_length is {max_length}: the model's context holds {context_length}; set it to that or less")
    num_slots, page_size = config.max_sequences or defaults["max_sequences"], config.page_size
    room = _free_memory(layout) / num_replicas
    per_page = page_size * (token_bytes(model, layout, dtype) + (token_bytes(draft.model, draft.layout, draft.dtype) if draft else 0))
    pages = lambda tokens: -(-tokens // page_size)
    wanted = num_slots * pages(max_length)
    most = int(room * (defaults["memory_share"] if config.max_tokens_in_cache is None else 1) / per_page) - 1
    num_pages = min(wanted, most) if config.max_tokens_in_cache is None else pages(config.max_tokens_in_cache)
    if num_pages > most or num_pages < 1:
        raise UserError(_too_large(layout, max(num_pages, 1) * per_page, room))
    chunk_tokens = min(config.chunk_tokens or defaults["chunk_tokens"], power_of_two(max_length))
    num_ids, pages = tokenizer.vocab_size if tokenizer else None, choose_pages(layout)(num_pages + 1, page_size)
    programs = Programs(model, layout, dtype, pages, num_ids, 0 if draft else config.guesses)
    ahead = Draft(Programs(draft.model, draft.layout, draft.dtype, pages, num_ids), config.guesses) if draft else None
    return Engine(programs, tokenizer, max_length, num_slots, chunk_tokens, config.reserve, config.micro_batches, config.strict, ahead)


def choose_pages(layout: Layout) -> type[PageLayout]:
    """Returns the page layout that suits the devices of a mesh."""
    return GpuPageLayout if layout.mesh.devices.flat[0].platform in ("gpu", "cuda") else PageLayout


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
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:  # not Linux: what is free is not told, and half of all is a guess
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return free / len(layout.mesh.local_devices)
