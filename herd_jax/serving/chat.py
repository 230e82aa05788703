"""/v1/chat/completions: the assistant's next message, with tool calls."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from herd_jax.errors import UserError
from herd_jax.inference.engine.grammar import Grammar
from herd_jax.inference.engine.requests import Answer, LogProb, Request
from herd_jax.serving import parameters
from herd_jax.serving.errors import bad
from herd_jax.serving.served import Account, Served
from herd_jax.serving.tokens import chat_log_probs
from herd_jax.text import chat
from herd_jax.text.llama3_chat import PYTHON_TAG, is_llama3
from herd_jax.text.tool_calls import describe_tools, read_calls, read_tagged_calls

CALLS_BEGIN = ("<tool_call>", "<function=", "{", "[")  # of what may turn out to be a call, an answer's text so far
ARGUMENTS = {"type": "object"}


class Chat:
    """One request: its dialog, and its answers in OpenAI's form. Raises Refused for what contradicts itself."""

    def __init__(self, served: Served, body: dict[str, Any], account: Account) -> None:
        self.served, self.body, self.account = served, body, account
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        parameters.check_stream(body)
        if "top_logprobs" in body and not body.get("logprobs"):
            raise bad("'top_logprobs' needs 'logprobs': true; set it, or leave both out", "top_logprobs", "contradiction")
        self.top = body.get("top_logprobs", 0) if body.get("logprobs") else None
        self.tools = [tool["function"] for tool in body.get("tools", ())]
        self.choice = body.get("tool_choice", "auto" if self.tools else "none")
        grammar = self._grammar()
        ids = self._ids()
        room = served.room(ids, "messages")
        limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
        if len({*limits}) > 1:
            raise bad("'max_tokens' and 'max_completion_tokens' contradict each other: give one of them", "max_tokens", "contradiction")
        if limits and limits[0] < 1:
            raise bad("'max_tokens' is 0, so there would be no answer: give 1 or more", "max_tokens", "invalid_value")
        given = {name: value for name, value in body.items() if name not in ("logprobs", "max_tokens")}
        sampling = parameters.sampling(given | {"logprobs": self.top, "max_tokens": min([*limits, room])}, room)
        self.request = Request(ids, sampling, body.get("n", 1), 0, False, grammar, body.get("cache_salt", ""))

    # --- the prompt

    def _ids(self) -> list[int]:
        tokenizer, tools = self.served.model.text_tokenizer(), [] if self.choice == "none" else self.tools
        messages = [dict(message) for message in self.body["messages"]]
        try:
            if tools and not is_llama3(tokenizer) and "tools" not in (tokenizer.chat_template or ""):  # the template would leave them out
                messages, tools = _told_of_tools(messages, describe_tools(tools, "json")), []
            for message in messages:
                message.pop("refusal", None)
            return list(chat.render(messages, tokenizer, add_assistant_header=True, tools=tools).ids)
        except UserError as error:
            raise bad(str(error), "messages", "invalid_value") from error

    def _grammar(self) -> Grammar | None:
        grammar, named = parameters.grammar(self.body), None
        if self.choice in ("none", "auto"):
            return grammar
        if not self.tools:
            raise bad("'tool_choice' asks for a call and there are no 'tools': give them", "tool_choice", "contradiction")
        if grammar is not None:
            raise bad("'tool_choice' asks for a call and 'response_format' for another answer: leave one of them out", "response_format", "contradiction")
        if isinstance(self.choice, dict):
            named = self.choice["function"]["name"]
            if named not in [tool["name"] for tool in self.tools]:
                raise bad(f"'tool_choice' names the function '{named}', which is not among 'tools': name one that is", "tool_choice", "invalid_value")
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "parameters": tool.get("parameters") or ARGUMENTS},
                "required": ["name", "parameters"], "additionalProperties": False,
            }
            for tool in self.tools
            if named in (None, tool["name"])
        ]  # fmt: skip
        return Grammar.json_schema(calls[0] if len(calls) == 1 else {"anyOf": calls})

    # --- the answer

    async def whole(self) -> dict[str, Any]:
        """Returns all answers."""
        answers = [event async for _, event in self.served.stream([self.request], self.account) if isinstance(event, Answer)]
        choices = []
        for answer in sorted(answers, key=lambda answer: answer.sample):
            text, calls = self._read(answer.text, answer.ids)
            message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
            if calls:
                message["tool_calls"] = calls
            reason = "tool_calls" if calls and answer.finish_reason == "stop" else answer.finish_reason
            choices.append({"index": answer.sample, "message": message, "logprobs": self._shown(answer.log_probs), "finish_reason": reason})
        return self.head | {"object": "chat.completion", "choices": choices, "usage": self.account.usage()}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the answers in pieces: text as it comes, and a call when it is whole, in one piece."""
        held: dict[int, list[str]] = {}
        holds: set[int] = set()  # samples whose text may be a call
        ids: dict[int, list[int]] = {}
        for sample in range(self.request.num_samples):
            yield self._chunk(sample, {"role": "assistant", "content": ""})
        async for _, event in self.served.stream([self.request], self.account):
            sample = event.sample
            if isinstance(event, Answer):
                continue
            text, reason, calls = event.text, event.finish_reason, []
            if self.choice != "none":
                held.setdefault(sample, []).append(text)
                ids.setdefault(sample, []).extend(event.ids)
                whole = "".join(held[sample])
                if sample in holds or self._may_be_call(whole, ids[sample]):
                    holds.add(sample)
                    text = ""
                    if reason:
                        text, calls = self._read(whole, ids[sample])
                else:
                    held[sample] = []
                    text = whole
            if reason == "stop" and calls:
                reason = "tool_calls"
            shown = self._shown(event.log_probs)
            if text or shown and shown["content"]:
                yield self._chunk(sample, {"content": text}, shown)
            for number, call in enumerate(calls):
                yield self._chunk(sample, {"tool_calls": [{"index": number} | call]})
            if reason:
                yield self._chunk(sample, {}, None, reason)
        if (self.body.get("stream_options") or {}).get("include_usage"):
            yield self.head | {"object": "chat.completion.chunk", "choices": [], "usage": self.account.usage()}

    def _chunk(self, sample: int, delta: dict[str, Any], shown=None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": sample, "delta": delta, "logprobs": shown, "finish_reason": reason}
        return self.head | {"object": "chat.completion.chunk", "choices": [choice]}

    def _shown(self, log_probs: tuple[LogProb, ...]) -> dict[str, Any] | None:
        return None if self.top is None else chat_log_probs(self.served.model.text_tokenizer(), log_probs, self.top)

    def _may_be_call(self, text: str, ids: list[int]) -> bool:
        begin, tag = text.lstrip(), self.served.model.text_tokenizer().special_ids.get(PYTHON_TAG)
        return tag in ids or not begin or any(begin.startswith(sign) or sign.startswith(begin) for sign in CALLS_BEGIN) or "<tool_call>" in begin

    def _read(self, text: str, ids) -> tuple[str, list[dict[str, Any]]]:
        """Returns the text and the calls of an answer; only calls of the tools there are are calls."""
        if self.choice == "none":
            return text, []
        tag = self.served.model.text_tokenizer().special_ids.get(PYTHON_TAG)
        rest, calls = read_tagged_calls(text)
        if not calls:
            rest, calls = read_calls(text, tag in ids)
        names = {tool["name"] for tool in self.tools}
        if not calls or not all(call.name in names for call in calls):
            return text, []
        if self.body.get("parallel_tool_calls") is False:
            calls = calls[:1]
        made = [{"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)} for call in calls]
        return rest, [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function} for function in made]


def _told_of_tools(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Returns the dialog with what tools there are in its system message."""
    if messages[0]["role"] in ("system", "developer"):
        first = messages[0]
        own = first.get("content") or ""
        own = own if isinstance(own, str) else "".join(part["text"] for part in own)
        return [first | {"content": f"{own}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
