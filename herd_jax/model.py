"""The Python API: a model loaded from any checkpoint, to score, generate, chat with, and save."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from herd_jax.errors import UserError
from herd_jax.inference.decoder import Decoder
from herd_jax.inference.draw import NOT_FINITE, draw
from herd_jax.inference.sampling import Sampling, several
from herd_jax.inference.scoring.whole_rows import Scorer, bucket
from herd_jax.inference.stopping import StopCondition
from herd_jax.inference.weights import Weights
from herd_jax.interop import save as interop
from herd_jax.interop.load import load_array, open_source
from herd_jax.interop.mesh_reader import MeshReader
from herd_jax.interop.source import Source
from herd_jax.mesh import MeshConfig, make_mesh, request_cpu_devices
from herd_jax.models.config import LlamaConfig
from herd_jax.models.llama import Llama
from herd_jax.models.params import Layout
from herd_jax.text import chat
from herd_jax.text.tokenizer import Tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class TextLoss(NamedTuple):
    """The loss of one text: of its tokens after the first, each predicted from those before it. The first is the begin token where the model
    has one."""

    nats_per_token: float
    bits_per_byte: float


def load(path: str | Path, mesh: Mesh | MeshConfig | None = None, dtype: str | None = None) -> "Model":
    """Loads the model at `path`: a Hugging Face, Meta or herd directory, a GGUF file, or the workdir of a training run.

    The weights are read when they are first used, so until then the files must stay. Without `mesh`, it uses one device. `dtype` is that of the weights and the computation, "float32" or "bfloat16"; by default bfloat16 on
    accelerators and float32 on CPU. An FP8 feed-forward stays FP8. Raises UserError for what cannot be read or laid out.
    """
    _check(dtype)
    return load_source(open_source(path), mesh, dtype)


def load_source(source: Source, mesh: Mesh | MeshConfig | None = None, dtype: str | None = None) -> "Model":
    """Does what `load` does, with a model that is open already."""
    _check(dtype)
    if isinstance(mesh, MeshConfig) and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # jax has started: make_mesh says whether the mesh fits its devices
            request_cpu_devices(mesh)
    if not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh) if mesh else make_mesh(MeshConfig(dp=1), jax.devices()[:1])
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    source.config.check_mesh(mesh)
    model, layout = Llama.make(source.config, "blockwise"), Layout.make(mesh, source.config.num_layers)
    compute = DTYPES[dtype or ("float32" if on_cpu else "bfloat16")]
    read = lambda name, declaration, stored: load_array(source, name, declaration, mesh, stored, compute)
    return Model(model, layout, Weights(model, layout, compute, read), source.tokenizer, source.context_length, compute)


def _check(dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype is '{dtype}': it must be one of {', '.join(DTYPES)}")


def _only(stream: Generator[list[str], None, list[bool]]) -> Generator[str, None, bool]:
    """Yields the texts of the only row, and returns whether it was cut."""
    while True:
        try:
            (text,) = next(stream)
        except StopIteration as end:
            return end.value[0]
        yield text


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights on a mesh and their tokenizer. `context_length` in tokens; None: no limit is known."""

    llama: Llama
    layout: Layout
    weights: Weights
    tokenizer: Tokenizer | None
    context_length: int | None
    dtype: jnp.dtype

    @classmethod
    def of(cls, llama: Llama, layout: Layout, params: dict, tokenizer: Tokenizer | None, context_length: int | None, dtype: jnp.dtype) -> "Model":
        """Returns a model of parameters that are there already, as training stores them."""
        return cls(llama, layout, Weights.of(params, llama, layout, dtype), tokenizer, context_length, dtype)

    @property
    def config(self) -> LlamaConfig:
        return self.llama.config

    @property
    def params(self) -> dict:
        """Returns the parameters as training stores them."""
        return self.weights.stacked()

    def with_params(self, params: dict) -> "Model":
        """Returns the same model with other parameters, which are as training stores them."""
        return Model.of(self.llama, self.layout, params, self.tokenizer, self.context_length, self.dtype)

    def logits(self, token_ids) -> np.ndarray:
        """Returns, for ids int [B, S], the logits of the next token after each, FP32 [B, S, V]."""
        try:
            ids = np.asarray(token_ids)
        except ValueError as error:
            raise UserError("token_ids has rows of different lengths: give integers of shape [batch, sequence], at least one") from error
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"token_ids is {ids.dtype} of shape {ids.shape}: give integers of shape [batch, sequence], at least one")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UserError(f"token_ids reach from {ids.min()} to {ids.max()}: they must lie between 0 and {self.config.vocab_size - 1}")
        self._check_length(ids.shape[1], "token_ids")
        return self._scorer.logits(self.params, ids)

    def loss(self, texts: Sequence[str]) -> list[TextLoss]:
        """Returns the loss of each text; those of similar length are computed together."""
        rows = [self._text_ids(text) for text in several(texts, "texts")]
        sums = self._scorer.loss(self.params, rows).tolist()
        per_text = zip(sums, rows, texts, strict=True)
        return [TextLoss(nats / (len(row) - 1), nats / math.log(2) / self._num_bytes(text, row)) for nats, row, text in per_text]

    def continues_with(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns bool [prompts]: whether greedy decoding of each prompt's ids begins with the ids of its answer, from one forward of both."""
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        self._check_length(max(map(len, rows)), "the prompt with its answer is")
        return self._scorer.misses(self.params, rows, [len(prompt) for prompt in prompts]) == 0

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:  # fmt: skip
        """Does what `generate` does, with prompts that are token ids."""
        for prompt in prompts:
            self._check_ids(prompt)
        return ["".join(parts) for parts in zip(*self._stream(prompts, max_new_tokens, temperature, top_p, seed, stop))] if prompts else []

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:  # fmt: skip
        """Returns what follows each prompt, up to a stop token of the tokenizer or one of the `stop` strings, both left out. Temperature 0
        takes the likeliest token."""
        rows = [self._prompt_ids(prompt) for prompt in several(prompts, "prompts")]
        return ["".join(parts) for parts in zip(*self._stream(rows, max_new_tokens, temperature, top_p, seed, stop))] if rows else []

    def stream(self, prompt: str, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, stop=()) -> Iterator[str]:
        """Yields what `generate` returns, for one prompt, in pieces as they come; returns whether it was cut off for want of room."""
        if not isinstance(prompt, str):
            raise UserError(f"prompt is of type {type(prompt).__name__}: it must be a string")
        several([prompt], "the prompt")
        return _only(self._stream([self._prompt_ids(prompt)], max_new_tokens, temperature, top_p, seed, stop))

    def stream_chat(self, messages, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, stop=()) -> Iterator[str]:
        """Yields the assistant's answer to a dialog (dicts with "role" and "content"), in pieces as they come; returns whether it was cut off for
        want of room."""
        return _only(self._stream([self.chat_ids(messages)], max_new_tokens, temperature, top_p, seed, stop))

    def chat_ids(self, messages) -> list[int]:
        """Returns the prompt for the answer to a dialog. Raises UserError where the model has no format for dialogs."""
        return list(chat.render(messages, self.text_tokenizer(), add_assistant_header=True).ids)

    def chat(self, messages, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, stop=()) -> str:
        """Returns the assistant's answer to a dialog of dicts with "role" and "content"."""
        return "".join(self.stream_chat(messages, max_new_tokens, temperature, top_p, seed, stop))

    def save(self, directory: str | Path, format: str = "herd") -> None:
        """Writes the model, in the dtype it is held in, and its tokenizer as "herd", "huggingface" or "meta" (a file for each tp rank).

        On the mesh of several processes all make this call, and write together into a directory that they share. Raises UserError if the
        directory exists or the format is another.
        """
        read, tp = MeshReader(self.weights), self.layout.mesh.shape["tp"]
        interop.save(directory, format, self.config, read, self.dtype, self.tokenizer, self.context_length, tp)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.llama, self.layout, self.dtype)

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.llama, self.layout, self.dtype)

    def text_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; raises UserError where there is none."""
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer beside it, so it takes token ids only: put the tokenizer's files into its directory")
        return self.tokenizer

    def _prompt_ids(self, prompt: str) -> list[int]:
        tokenizer = self.text_tokenizer()
        ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
        if not ids:
            raise UserError("the prompt is empty and the tokenizer has no token to begin with: give a prompt of at least one character")
        self._check_ids(ids)
        return ids

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids or not all(0 <= i < self.config.vocab_size for i in ids):
            raise UserError(
                f"a prompt has token ids for which the model has no embedding, or none at all: give ids from 0 to {self.config.vocab_size - 1}"
            )

    def _text_ids(self, text: str) -> list[int]:
        ids = self._prompt_ids(text)
        if len(ids) < 2:
            raise UserError(f"the text {text!r} is one token: a loss needs a token before the one that is predicted; give a longer text")
        self._check_length(len(ids), "the text is")
        return ids

    def _num_bytes(self, text: str, ids: list[int]) -> int:
        """Returns the text's size. Raises UserError where the tokenizer lost a part of it, though it should not."""
        size, tokenizer = len(text.encode()), self.text_tokenizer()
        if tokenizer.is_lossless and (encoded := sum(map(tokenizer.num_bytes, ids))) != size:
            raise UserError(f"the tokenizer turned a text of {size} bytes into tokens of {encoded}: its files are damaged, so copy them again")
        return size

    def _check_length(self, num_tokens: int, what: str) -> None:
        if self.context_length is not None and num_tokens > self.context_length:
            raise UserError(f"{what} {num_tokens} tokens long: the model's context holds {self.context_length}; shorten it")

    def _stream(
        self, rows: list[list[int]], max_new_tokens: int, temperature: float, top_p: float, seed: int, stop
    ) -> Generator[list[str], None, list[bool]]:  # fmt: skip
        """Yields the new text of each row, token by token, "" for a row that has ended; returns which were cut off for want of room."""
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, stop)
        self._check_length(max(map(len, rows)), "the prompt is")
        rooms = [max_new_tokens if self.context_length is None else min(max_new_tokens, self.context_length - len(row)) for row in rows]
        stops = [StopCondition(self.text_tokenizer(), sampling.stop, room) for room in rooms]
        for ids in self._steps(rows, max(rooms), sampling):
            if (ids == NOT_FINITE).any():
                raise UserError(
                    f"the model's logits are not finite numbers, so there is no answer: its weights are damaged, or too large for {self.dtype.__name__}"
                    "; take another copy of them, or load them with dtype float32"
                )
            yield [of_row.push(int(token)) for of_row, token in zip(stops, ids)]
            if all(of_row.ended for of_row in stops):
                break
        yield [of_row.flush() for of_row in stops]
        return [of_row.was_cut for of_row in stops]

    def _steps(self, rows: list[list[int]], num_steps: int, sampling: Sampling) -> Iterator[np.ndarray]:
        """Yields new ids [B], step by step. The next step is under way when one is given, so that the device does not wait for the reader."""
        size, batch = bucket(max(map(len, rows))), bucket(len(rows), least=1)
        ids, padding = np.zeros((batch, size), np.int32), np.full(batch, size - 1, np.int32)
        for i, row in enumerate(rows):
            ids[i, size - len(row) :], padding[i] = row, size - len(row)
        num_ids, weights = self.text_tokenizer().vocab_size, self.weights.apart()
        options, lengths = sampling.options(batch), np.array([len(row) for row in rows] + [1] * (batch - len(rows)), np.int32)
        logits, cache = self._decoder.prefill(bucket(size + num_steps))(weights, ids, padding)
        for step in range(num_steps):
            new = draw(logits, options, lengths + step, num_ids)
            if step + 1 < num_steps:
                logits, cache = self._decoder.decode(weights, cache, new, padding, jnp.int32(size + step))
            yield np.asarray(new)[: len(rows)]
