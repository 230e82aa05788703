"""/v1/completions: what follows a prompt."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from herd_jax.errors import UserError
from herd_jax.inference.engine.requests import Answer, Request
from herd_jax.serving import parameters
from herd_jax.serving.errors import bad
from herd_jax.serving.served import Account, Served
from herd_jax.serving.tokens import completion_log_probs

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completion:
    """One request: its prompts, and its answers in OpenAI's form. Raises Refused for what contradicts itself."""

    def __init__(self, served: Served, body: dict[str, Any], account: Account) -> None:
        self.served, self.body, self.account = served, body, account
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": served.name}
        self.number, self.best_of = body.get("n", 1), body.get("best_of", body.get("n", 1))
        self.echo, self.log_probs = body.get("echo", False), body.get("logprobs")
        parameters.check_stream(body)
        if self.best_of < self.number:
            raise bad(f"'best_of' is {self.best_of} and 'n' is {self.number}: make it at least as large", "best_of", "contradiction")
        if body.get("stream") and self.best_of > self.number:
            raise bad("'best_of' chooses among whole answers, which a stream cannot wait for: leave one of them out", "best_of", "contradiction")
        if body.get("max_tokens") == 0 and not self.echo:
            raise bad("'max_tokens' is 0 and 'echo' is not set, so there would be no answer: set one of them", "max_tokens", "invalid_value")
        grammar = parameters.grammar(body)
        self.requests = []
        for ids in self._prompts(body["prompt"]):
            room = served.room(ids, "prompt")
            sampling = parameters.sampling(body | ({"logprobs": 0} if self.best_of > self.number and self.log_probs is None else {}), min(DEFAULT_MAX_TOKENS, room))
            scores = self.echo and self.log_probs is not None
            self.requests.append(Request(ids, sampling, self.best_of, 0, scores, grammar, body.get("cache_salt", "")))

    def _prompts(self, prompt: Any) -> list[list[int]]:
        tokenizer, vocab_size = self.served.model.text_tokenizer(), self.served.model.config.vocab_size
        several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        rows = []
        for one in several:
            if isinstance(one, str):
                try:
                    rows.append(tokenizer.encode(one, bos=self.body.get("add_special_tokens", True) and tokenizer.adds_bos))
                except (UnicodeEncodeError, UserError) as error:
                    raise bad("'prompt' is no text in UTF-8: correct it", "prompt", "invalid_value") from error
            else:
                if outside := [i for i in one if not 0 <= i < vocab_size]:
                    raise bad(f"'prompt' has the token id {outside[0]}: the model has ids from 0 to {vocab_size - 1}", "prompt", "invalid_value")
                rows.append([int(i) for i in one])
        return rows

    async def whole(self) -> dict[str, Any]:
        """Returns all answers."""
        found: list[list[Answer]] = [[] for _ in self.requests]
        async for i, event in self.served.stream(self.requests, self.account):
            if isinstance(event, Answer):
                found[i].append(event)
        choices = []
        for answers in found:
            answers.sort(key=lambda answer: answer.sample)
            if self.best_of > self.number:
                mean = lambda answer: sum(one.raw for one in answer.log_probs) / max(1, len(answer.log_probs))
                answers = sorted(answers, key=mean, reverse=True)[: self.number]
            choices += [self._choice(len(choices) + j, answer) for j, answer in enumerate(answers)]
        return self.head | {"choices": choices, "usage": self.account.usage()}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        tokenizer = self.served.model.text_tokenizer()
        only_echo = self.body.get("max_tokens") == 0
        text, log_probs = ("", ()) if only_echo else (answer.text, answer.log_probs)
        begin, shown = "", None
        if self.echo:
            begin = self._echoed(answer.request)
        if self.log_probs is not None:
            scored = (*answer.prompt_log_probs, *log_probs) if self.echo else log_probs
            first = answer.request.prompt[:1] if self.echo else ()
            shown = completion_log_probs(tokenizer, scored, self.log_probs, first)
        reason = "length" if only_echo else answer.finish_reason
        return {"index": index, "text": begin + text, "logprobs": shown, "finish_reason": reason, "stop_reason": None if only_echo else answer.stop}

    def _echoed(self, request: Request) -> str:
        given, place = self.body["prompt"], self.requests.index(request)
        if isinstance(given, str):
            return given
        return given[place] if isinstance(given[0], str) else self.served.model.text_tokenizer().decode(request.prompt)

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the answers in pieces."""
        tokenizer = self.served.model.text_tokenizer()
        begun: set[tuple[int, int]] = set()
        lengths: dict[tuple[int, int], int] = {}
        waits = self.echo and self.log_probs is not None  # the prompt's log-probabilities are there when an answer is
        async for i, event in self.served.stream(self.requests, self.account):
            if isinstance(event, Answer):
                if waits:
                    choice = self._choice(0, event)
                    yield self._chunk(i, event.sample, choice["text"], event.finish_reason, choice["logprobs"])
                continue
            key = i, event.sample
            text = "" if self.body.get("max_tokens") == 0 else event.text
            if self.echo and key not in begun:
                text = self._echoed(self.requests[i]) + text
            begun.add(key)
            shown = None
            if self.log_probs is not None:
                shown = completion_log_probs(tokenizer, event.log_probs, self.log_probs, (), lengths.get(key, 0))
            lengths[key] = lengths.get(key, 0) + len(text)
            if not waits and (text or shown or event.finish_reason):
                yield self._chunk(i, event.sample, text, event.finish_reason, shown)
        if (self.body.get("stream_options") or {}).get("include_usage"):
            yield self.head | {"choices": [], "usage": self.account.usage()}

    def _chunk(self, i: int, sample: int, text: str, reason: str | None, shown) -> dict[str, Any]:
        choice = {"index": i * self.number + sample, "text": text, "logprobs": shown, "finish_reason": reason}
        return self.head | {"choices": [choice]}
