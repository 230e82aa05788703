"""The server: its paths, and what holds for all of them: keys, limits, errors in one form, and one log line a request."""

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import jsonschema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from herd_jax.errors import UserError
from herd_jax.serving import parameters
from herd_jax.serving.chat import Chat
from herd_jax.serving.completions import Completion
from herd_jax.serving.errors import Refused, bad
from herd_jax.serving.limits import Keys, Limits
from herd_jax.serving.metrics import Metrics
from herd_jax.serving.openapi import document
from herd_jax.serving.page import PAGE
from herd_jax.serving.schemas import CHAT, COMPLETION, DETOKENIZE, TOKENIZE
from herd_jax.serving.served import Account, Served
from herd_jax.serving.tokens import token_text
from herd_jax.text import chat

log = logging.getLogger("herd_jax.serving")
Handler = Callable[[Request, Account], Awaitable[Response]]
NO_EMBEDDINGS = (
    "the models here are trained to continue text, and the mean of their states is no embedding that was trained to be one: "
    "use a sentence encoder for /v1/embeddings"
)


class Server:
    """Serves models. `metrics` is the one that the models were started with."""

    def __init__(self, models: Sequence[Served], metrics: Metrics, limits: Limits = Limits(), keys: Keys = Keys(())) -> None:
        self.models = {model.name: model for model in models}
        self.metrics, self.limits, self.keys, self.is_draining = metrics, limits, keys, False
        schemas = {"completion": COMPLETION, "chat": CHAT, "tokenize": TOKENIZE, "detokenize": DETOKENIZE}
        self._validators = {name: jsonschema.Draft202012Validator(schema) for name, schema in schemas.items()}
        routes = [
            Route("/", self._open(self.page)), Route("/health", self._open(self.health)), Route("/openapi.json", self._open(self.openapi)),
            Route("/metrics", self._guarded(self.figures)), Route("/v1/models", self._guarded(self.list_models)),
            Route("/v1/models/{name:path}", self._guarded(self.list_models)),
            Route("/v1/completions", self._guarded(self.complete), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/embeddings", self._guarded(self.embed), methods=["POST"]),
            Route("/tokenize", self._guarded(self.tokenize), methods=["POST"]),
            Route("/tokenizer_info", self._guarded(self.tokenizer_info)),
            Route("/detokenize", self._guarded(self.detokenize), methods=["POST"]),
        ]  # fmt: skip
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})

    def stop(self) -> None:
        for model in self.models.values():
            model.runner.stop()

    # --- what holds for all paths

    def _open(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Returns a handler that everybody may call."""
        return self._answered(handler)

    def _guarded(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Returns a handler that needs a key, where there are keys."""

        async def checked(request: Request, account: Account) -> Response:
            self.keys.check(request.headers.get("authorization"))
            return await handler(request, account)

        return self._answered(checked)

    def _answered(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Returns a handler whose refusals are answers, and that writes a line into the log."""

        async def answer(request: Request) -> Response:
            account, name = Account(), request.headers.get("x-request-id", "")[:128] or secrets.token_hex(8)
            try:
                response = await handler(request, account)
            except Refused as refused:
                response = JSONResponse(refused.body, refused.status, refused.headers)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                _log(request, 500, account, name)
                log.exception("a request failed by a fault of the server")
                response = JSONResponse(Refused(500, "the server has failed at this request: report it with the request").body, 500)
            response.headers["X-Request-Id"] = name
            if isinstance(response, StreamingResponse):
                response.body_iterator = _logged(response.body_iterator, lambda: _log(request, response.status_code, account, name))
            else:
                _log(request, response.status_code, account, name)
            return response

        return answer

    async def _body(self, request: Request, kind: str) -> dict[str, Any]:
        """Returns the body, checked against its schema, without what is null."""
        if self.is_draining:
            raise Refused(503, "the server is ending and takes no more requests: send this one to another", None, "ending", 10)
        media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise Refused(415, f"the body is of type '{media_type[:80]}': send JSON, as application/json")
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self.limits.max_body:
                raise Refused(413, f"the body is larger than {self.limits.max_body} bytes: send less")
        try:
            body = json.loads(bytes(content), parse_constant=_no_constant, parse_float=_number)
            bytes(json.dumps(body, ensure_ascii=False), "utf-8")
        except UnicodeEncodeError as error:
            raise bad("the body has half of a surrogate pair in it, which is no text: correct it", None, "invalid_json") from error
        except (ValueError, RecursionError) as error:
            raise bad(f"the body is not JSON ({str(error)[:100]}): correct it", None, "invalid_json") from error
        return parameters.check(self._validators[kind], body)

    def _model(self, body: dict[str, Any], account: Account) -> Served:
        name = body.get("model") or (next(iter(self.models)) if len(self.models) == 1 else None)
        if name is None:
            raise bad(f"'model' is missing: name one of {', '.join(self.models)}", "model", "missing_required_parameter")
        if name not in self.models:
            raise Refused(404, f"there is no model '{name[:80]}': name one of {', '.join(self.models)}", "model", "model_not_found")
        account.model = name
        return self.models[name]

    # --- the paths

    async def complete(self, request: Request, account: Account) -> Response:
        body = await self._body(request, "completion")
        return await self._reply(request, body, Completion(self._model(body, account), body, account))

    async def chat(self, request: Request, account: Account) -> Response:
        body = await self._body(request, "chat")
        return await self._reply(request, body, Chat(self._model(body, account), body, account))

    async def _reply(self, request: Request, body: dict[str, Any], asked: Completion | Chat) -> Response:
        """Returns the whole answer, or its stream when its first piece is there, so that what is refused has a status of its own."""
        if body.get("stream"):
            pieces = asked.stream()
            first = await anext(pieces)
            second = await _unless_gone(request, anext(pieces, None))
            begun = [piece for piece in (first, second) if piece]
            return Events(_events(pieces, begun), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return JSONResponse(await _unless_gone(request, asked.whole()))

    async def embed(self, request: Request, account: Account) -> Response:
        raise Refused(404, NO_EMBEDDINGS, None, "not_supported")

    async def tokenize(self, request: Request, account: Account) -> Response:
        body = await self._body(request, "tokenize")
        served = self._model(body, account)
        tokenizer = served.model.text_tokenizer()
        given = [name for name in ("prompt", "content", "messages") if name in body]
        if len(given) != 1:
            raise bad("give one of 'prompt', 'content' and 'messages'", given[1] if given else "prompt", "contradiction")
        if given == ["messages"]:
            try:
                ids = list(chat.render(body["messages"], tokenizer, add_assistant_header=True).ids)
            except UserError as error:
                raise bad(str(error), "messages", "invalid_value") from error
        else:
            begins = body.get("add_special_tokens", body.get("add_special", given == ["prompt"]))
            ids = tokenizer.encode(body[given[0]], bos=begins and tokenizer.adds_bos)
        pieces = [{"id": i, "piece": token_text(tokenizer, i)} for i in ids]
        return JSONResponse({"tokens": pieces if body.get("with_pieces") else ids, "count": len(ids), "max_model_len": served.max_length})

    async def detokenize(self, request: Request, account: Account) -> Response:
        body = await self._body(request, "detokenize")
        tokenizer, ids = self._model(body, account).model.text_tokenizer(), [int(i) for i in body["tokens"]]
        if outside := [i for i in ids if i >= tokenizer.vocab_size]:
            raise bad(f"'tokens' has {outside[0]}: the tokenizer has ids from 0 to {tokenizer.vocab_size - 1}", "tokens", "invalid_value")
        text = tokenizer.decode(ids)
        return JSONResponse({"prompt": text, "content": text})

    async def tokenizer_info(self, request: Request, account: Account) -> Response:
        name = request.query_params.get("model")
        tokenizer = self._model({"model": name} if name else {}, account).model.text_tokenizer()
        names = {i: special for special, i in tokenizer.special_ids.items()}
        kinds = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        return JSONResponse({kind: names.get(i) for kind, i in kinds.items()} | {"chat_template": tokenizer.chat_template, "vocab_size": tokenizer.vocab_size})

    async def list_models(self, request: Request, account: Account) -> Response:
        cards = [
            {"id": model.name, "object": "model", "created": model.created, "owned_by": "herd_jax", "max_model_len": model.max_length}
            for model in self.models.values()
        ]
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": cards})
        self._model({"model": name}, account)
        return JSONResponse(next(card for card in cards if card["id"] == name))

    async def health(self, request: Request, account: Account) -> Response:
        if self.is_draining:
            raise Refused(503, "the server is ending", None, "ending")
        if stopped := [model.name for model in self.models.values() if not model.runner.is_running]:
            raise Refused(503, f"the engine of {', '.join(stopped)} has stopped: start the server again", None, "engine_stopped")
        return JSONResponse({"status": "ok"})

    async def figures(self, request: Request, account: Account) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request, account: Account) -> Response:
        return JSONResponse(document(bool(self.keys)))

    async def page(self, request: Request, account: Account) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'"
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})


def _number(text: str) -> float | int:
    """Returns a number as it is counted with: to JSON 2.0 is whole."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


class Events(StreamingResponse):
    """A stream that ends what makes it when nobody listens any more."""

    async def stream_response(self, send) -> None:
        async with contextlib.aclosing(self.body_iterator):
            await super().stream_response(send)


async def _unless_gone(request: Request, answer: Awaitable) -> Any:
    """Returns what is awaited, unless the client goes: then it is cancelled, and what it holds is free."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, watch):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await work


async def _events(pieces: AsyncIterator[dict[str, Any]], first: list[dict[str, Any]]) -> AsyncIterator[str]:
    """Yields pieces as server-sent events; a refusal that comes in the middle is the last but one."""
    line = lambda content: f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
    try:
        for piece in first:
            yield line(piece)
        async for piece in pieces:
            yield line(piece)
    except Refused as refused:
        yield line(refused.body)
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


async def _logged(parts: AsyncIterator[str], write: Callable[[], None]) -> AsyncIterator[str]:
    try:
        async for part in parts:
            yield part
    finally:
        await parts.aclose()
        write()


def _log(request: Request, status: int, account: Account, name: str) -> None:
    client = request.client.host if request.client else None
    line = {
        "id": name, "client": client, "method": request.method, "path": request.url.path, "status": status, "model": account.model,
        "prompt_tokens": account.prompt_tokens, "cached_tokens": account.cached_tokens, "completion_tokens": account.completion_tokens,
        "finish": account.reasons, "seconds_to_first": account.seconds_to_first and round(account.seconds_to_first, 4), "seconds": round(account.seconds, 4),
    }  # fmt: skip
    log.info(json.dumps(line))


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Answers what no path takes in the form of all errors."""
    message = {404: f"there is no path {request.url.path[:80]}: /openapi.json lists those there are", 405: "the path takes another method"}
    refused = Refused(error.status_code, message.get(error.status_code, str(error.detail)))
    return JSONResponse(refused.body, error.status_code, error.headers)
