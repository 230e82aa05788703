"""The Python API: a model loaded from any checkpoint, to score, generate, chat with, and save."""

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from herd_jax.errors import UserError
from herd_jax.inference.engine.build import EngineConfig, Parts, make_engine
from herd_jax.inference.engine.engine import Engine
from herd_jax.inference.engine.worker import power_of_two
from herd_jax.inference.engine.replicas import Replicas
from herd_jax.inference.engine.requests import Answer, Piece, Request
from herd_jax.inference.sampling import Sampling, several
from herd_jax.inference.scoring.whole_rows import Scorer
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
MAX_SEQUENCES = 32  # prompts that `generate` continues at the same time
LEAST_TOKENS = 1024  # that a sequence of `generate` has room for, where the context allows: a dialog that grows does not compile again at once
PAGE_SIZE = 64


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
        self.check_language()
        return self._scorer.logits(self.params, ids)

    def loss(self, texts: Sequence[str]) -> list[TextLoss]:
        """Returns the loss of each text; those of similar length are computed together."""
        self.check_language()
        rows = [self._text_ids(text) for text in several(texts, "texts")]
        sums = self._scorer.loss(self.params, rows).tolist()
        per_text = zip(sums, rows, texts, strict=True)
        return [TextLoss(nats / (len(row) - 1), nats / math.log(2) / self._num_bytes(text, row)) for nats, row, text in per_text]

    def continues_with(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns bool [prompts]: whether greedy decoding of each prompt's ids begins with the ids of its answer, from one forward of both."""
        self.check_language()
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        self._check_length(max(map(len, rows)), "the prompt with its answer is")
        return self._scorer.misses(self.params, rows, [len(prompt) for prompt in prompts]) == 0

    def log_probabilities(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Returns, for each prompt's ids, the log-probability in nats of each id of its answer, FP32 [ids of the answer]."""
        self.check_language()
        rows = self._joined(prompts, answers)
        return self._scorer.log_probabilities(self.params, rows, [len(prompt) for prompt in prompts])

    def rewards(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the reward that this reward model gives each answer's ids, which end with the end of the turn: [prompts]."""
        if not self.config.reward:
            raise UserError("the model is no reward model: make one with python -m herd_jax.post_train reward")
        return self._scorer.rewards(self.params, self._joined(prompts, answers))

    def _joined(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[list[int]]:
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        for prompt, row in zip(prompts, rows):
            self._check_ids(prompt)
            self._check_ids(row)
        self._check_length(max(map(len, rows), default=0), "the prompt with its answer is")
        return rows

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        stop: Sequence[str] = (), samples: Sequence[int] | None = None, **options,
    ) -> list[str]:  # fmt: skip
        """Does what `generate` does, with prompts that are token ids. `samples`: the number of each answer among those to the same prompt and
        seed; by default they are counted."""
        sampling = self._sampling(max_new_tokens, temperature, top_p, seed, stop, options)
        return self._texts(prompts, sampling, samples)

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        stop: Sequence[str] = (), **options,
    ) -> list[str]:  # fmt: skip
        """Returns what follows each prompt, up to a stop token of the tokenizer or one of the `stop` strings, both left out. Temperature 0
        takes the likeliest token. An answer depends on its prompt, the seed, and how often that prompt stands before it: equal prompts are
        answered by several samples. `options` are the other fields of `Sampling`."""
        sampling = self._sampling(max_new_tokens, temperature, top_p, seed, stop, options)
        return self._texts([self._prompt_ids(prompt) for prompt in several(prompts, "prompts")], sampling)

    def stream(
        self, prompt: str, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, stop=(), **options
    ) -> Iterator[str]:
        """Yields what `generate` returns, for one prompt, in pieces as they come; returns whether it was cut off for want of room."""
        if not isinstance(prompt, str):
            raise UserError(f"prompt is of type {type(prompt).__name__}: it must be a string")
        several([prompt], "the prompt")
        sampling = self._sampling(max_new_tokens, temperature, top_p, seed, stop, options)
        return self._pieces(Request(self._prompt_ids(prompt), sampling))

    def stream_chat(
        self, messages, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, stop=(), **options
    ) -> Iterator[str]:
        """Yields the assistant's answer to a dialog (dicts with "role" and "content"), in pieces as they come; returns whether it was cut off for
        want of room."""
        sampling = self._sampling(max_new_tokens, temperature, top_p, seed, stop, options)
        return self._pieces(Request(self.chat_ids(messages), sampling))

    def engine(self, draft: "Model | None" = None, **settings) -> Engine | Replicas:
        """Returns an engine, which answers many requests at the same time; `settings` are the fields of `EngineConfig`. `draft`: a smaller model
        on the same mesh, whose guesses make it faster and change nothing else. The engine holds the weights in the decoder's form.

        Raises UserError for a cache that does not fit into the memory, and a draft that does not belong to the model.
        """
        return make_engine(self._parts(), from_options(EngineConfig, settings), draft and draft._parts())

    def _parts(self) -> Parts:
        self.check_language()
        return Parts(self.llama, self.layout, self.dtype, self.weights.apart(), self.tokenizer, self.context_length)

    def chat_ids(self, messages) -> list[int]:
        """Returns the prompt for the answer to a dialog. Raises UserError where the model has no format for dialogs."""
        return list(chat.render(messages, self.text_tokenizer(), add_assistant_header=True).ids)

    def chat(self, messages, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, stop=(), **options) -> str:
        """Returns the assistant's answer to a dialog of dicts with "role" and "content"."""
        return "".join(self.stream_chat(messages, max_new_tokens, temperature, top_p, seed, stop, **options))

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

    def check_language(self) -> None:
        """Raises UserError for a reward model, which gives no text."""
        if self.config.reward:
            raise UserError("the model is a reward model, which gives rewards and no text: load a language model")

    @functools.cached_property
    def _own_engine(self) -> "_OwnEngine":
        return _OwnEngine()

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

    def _sampling(self, max_new_tokens, temperature, top_p, seed, stop, options) -> Sampling:
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop}
        return from_options(Sampling, given | options)

    def _texts(self, rows: Sequence[Sequence[int]], sampling: Sampling, samples: Sequence[int] | None = None) -> list[str]:
        if samples is None:
            seen: Counter = Counter()
            samples = [seen.update([key]) or seen[key] - 1 for key in map(tuple, rows)]
        return [answer.text for answer in self._answers([Request(row, sampling, first_sample=at) for row, at in zip(rows, samples, strict=True)])]

    def _answers(self, requests: list[Request]) -> list[Answer]:
        """Returns the answers in the order of the requests."""
        found: list[Answer | None] = [None] * len(requests)
        if requests:
            with self._running_engine(requests) as engine:
                for answer in engine.generate(requests):
                    self._check_finite(answer.finish_reason)
                    found[answer.ticket] = answer
        return found

    def _pieces(self, request: Request) -> Generator[str, None, bool]:
        """Yields the text of an answer as it comes; returns whether it was cut off for want of room."""
        with self._running_engine([request]) as engine:
            ticket = engine.submit(request)
            try:
                while True:
                    for piece in engine.step():
                        if isinstance(piece, Piece) and piece.ticket == ticket:
                            self._check_finite(piece.finish_reason)
                            yield piece.text
                            if piece.finish_reason:
                                return piece.finish_reason == "length"
            finally:
                engine.abort(ticket)
                while engine.has_work:
                    engine.step()

    @contextlib.contextmanager
    def _running_engine(self, requests: list[Request]):
        """Gives an engine that is large enough for the requests. It holds the weights only as long as they are computed."""
        self.text_tokenizer()
        for request in requests:
            self._check_ids(request.prompt)
        self._check_length(max(len(request.prompt) for request in requests), "the prompt is")
        lengths = sorted((len(request.prompt) + request.sampling.max_new_tokens for request in requests), reverse=True)
        config = self._own_engine.config_for(lengths, self.context_length)
        if config is not None:
            self._own_engine.engine, self._own_engine.config = self.engine(**config), config
        engine = self._own_engine.engine
        engine.hold(self.weights.apart())
        try:
            yield engine
        finally:
            engine.hold(None)

    def _check_finite(self, finish_reason: str | None) -> None:
        if finish_reason == "error":
            raise UserError(
                f"the model's logits are not finite numbers, so there is no answer: its weights are damaged, or too large for {self.dtype.__name__}"
                "; take another copy of them, or load them with dtype float32"
            )


class _OwnEngine:
    """The engine of a model's `generate`, made again when a larger one is needed."""

    def __init__(self) -> None:
        self.engine: Engine | Replicas | None = None
        self.config: dict[str, int] = {}

    def config_for(self, lengths: list[int], context_length: int | None) -> dict[str, int] | None:
        """Returns the settings of an engine for answers that reach these lengths, the longest first; None where the present one will do."""
        within = lambda length: min(length, context_length or length)
        sequences = min(power_of_two(len(lengths)), MAX_SEQUENCES)
        needed = {
            "max_sequences": sequences, "max_length": within(max(LEAST_TOKENS, power_of_two(within(lengths[0])))),
            "max_tokens_in_cache": sum(within(length) + PAGE_SIZE - 1 for length in lengths[:sequences]),
        }  # fmt: skip
        if all(self.config.get(name, 0) >= value for name, value in needed.items()):
            return None
        most = {name: max(value, self.config.get(name, 0)) for name, value in needed.items()}
        return most | {"max_tokens_in_cache": power_of_two(most["max_tokens_in_cache"]), "page_size": PAGE_SIZE}


def from_options(cls, options: dict):
    """Returns the dataclass with these fields. Raises UserError for an option that it does not have."""
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(options) - set(names)):
        raise UserError(f"there is no option {', '.join(unknown)}: choose among {', '.join(names)}")
    return cls(**options)
