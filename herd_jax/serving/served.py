"""A model that is served: its engine in a thread, what it may take on, and how its tokens are shown."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence

from herd_jax.errors import UserError
from herd_jax.inference.engine.replicas import Replicas
from herd_jax.inference.engine.requests import Answer, Piece, Request
from herd_jax.inference.engine.runner import EngineStopped, Runner
from herd_jax.model import Model
from herd_jax.serving.errors import Refused, bad
from herd_jax.serving.limits import Gate, Limits
from herd_jax.serving.metrics import Metrics


@dataclasses.dataclass
class Served:
    """`created`: seconds since 1970."""

    name: str
    model: Model
    runner: Runner
    gate: Gate
    metrics: Metrics
    created: int

    @classmethod
    def start(
        cls, name: str, model: Model, limits: Limits, metrics: Metrics, draft: Model | None = None, warm_up: bool = False, **settings
    ) -> "Served":  # fmt: skip
        """Loads a model into an engine and starts it; `warm_up`: compiles its steps first. Raises UserError where it does not fit."""
        model.text_tokenizer()
        engine = model.engine(draft=draft, **settings)
        if warm_up:
            engine.warm_up()
        observe = metrics.add_model(name, engine.engines if isinstance(engine, Replicas) else [engine])
        return cls(name, model, Runner(engine, observe).start(), Gate(limits), metrics, int(time.time()))

    @property
    def max_length(self) -> int:
        engine = self.runner.engine
        return (engine.engines[0] if isinstance(engine, Replicas) else engine).max_length

    def room(self, ids: Sequence[int], field: str) -> int:
        """Returns how many tokens fit behind a prompt. Raises Refused where none does."""
        if not ids:
            raise bad(f"'{field}' has no tokens: give a prompt of at least one", field, "invalid_value")
        if len(ids) >= self.max_length:
            raise bad(
                f"'{field}' is {len(ids)} tokens long, and the model's context holds {self.max_length} with the answer: shorten it", field,
                "context_length_exceeded",
            )  # fmt: skip
        return self.max_length - len(ids)

    async def stream(self, requests: Sequence[Request], account: "Account") -> AsyncIterator[tuple[int, Piece | Answer]]:
        """Yields what comes, with the number of its request. Raises Refused for what cannot be answered, or takes too long."""
        answers = sum(request.num_samples for request in requests)
        tokens = sum((len(r.prompt) + min(r.sampling.max_new_tokens, self.max_length - len(r.prompt))) * r.num_samples for r in requests)
        account.prompt_tokens = sum(len(request.prompt) for request in requests)
        with self.gate.enter(answers, tokens):
            self.metrics.asked(self.name, account.prompt_tokens)
            queue: asyncio.Queue = asyncio.Queue()
            tasks = [asyncio.create_task(self._feed(queue, i, request)) for i, request in enumerate(requests)]
            try:
                missing = answers
                while missing:
                    i, event = await asyncio.wait_for(queue.get(), max(0.001, self.gate.limits.timeout - account.seconds))
                    if isinstance(event, BaseException):
                        raise _told(event) from event
                    account.note(event)
                    if event.finish_reason == "error":
                        raise Refused(500, "the model's logits are not finite numbers, so there is no answer: its weights are damaged")
                    missing -= isinstance(event, Answer)
                    yield i, event
            except TimeoutError as error:
                raise Refused(504, f"the answer took longer than {self.gate.limits.timeout:g} seconds: ask for fewer tokens", None, "timeout") from error
            finally:
                for task in tasks:  # each aborts what it waits for
                    task.cancel()
                self.metrics.answered(self.name, account.seconds_to_first, account.seconds)

    async def _feed(self, queue: asyncio.Queue, i: int, request: Request) -> None:
        try:
            async for event in self.runner.stream(request):
                queue.put_nowait((i, event))
        except (UserError, EngineStopped) as error:
            queue.put_nowait((i, error))


class Account:
    """What a request has cost so far, for its log line and its answer. Seconds count from the request's arrival."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self.model: str | None = None
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.seconds_to_first: float | None = None
        self.reasons: list[str] = []

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def note(self, event: Piece | Answer) -> None:
        if isinstance(event, Piece):
            self.completion_tokens += len(event.ids)
            if event.ids and self.seconds_to_first is None:
                self.seconds_to_first = self.seconds
        else:
            self.reasons.append(event.finish_reason)
            if event.sample == event.request.first_sample:
                self.cached_tokens += event.num_found

    def usage(self) -> dict:
        """Returns the tokens as OpenAI counts them."""
        total = self.prompt_tokens + self.completion_tokens
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}
        return counts | {"prompt_tokens_details": {"cached_tokens": self.cached_tokens}}


def _told(error: BaseException) -> Refused:
    if isinstance(error, UserError):
        field = "response_format" if "schema" in str(error) or "regular expression" in str(error) else None
        return bad(str(error), field, "invalid_value")
    return Refused(503, "the engine has stopped: the server must be started again", None, "engine_stopped")
