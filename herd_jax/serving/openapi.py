"""The server's own description, for those who write clients and for tools that try it."""

from typing import Any

from herd_jax.serving.schemas import CHAT, COMPLETION, DETOKENIZE, TOKENIZE

ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}  # fmt: skip

ANSWER = {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"]}
TEXTS = {
    400: "The request is wrong in itself; `param` names the field.", 401: "The API key is missing or wrong.", 404: "There is no such model.",
    405: "The path takes another method.", 413: "The body or what it asks for is too large.", 415: "The body is not JSON.",
    429: "The server is busy; Retry-After says for how many seconds.", 500: "The model's numbers are damaged.", 503: "The server is ending.",
    504: "It took too long.",
}  # fmt: skip


def document(has_keys: bool) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document."""
    errors = {str(status): {"description": text, "content": {"application/json": {"schema": ERROR}}} for status, text in TEXTS.items()}
    json_answer = lambda schema: {"200": {"description": "The answer.", "content": {"application/json": {"schema": schema}}}}

    def post(summary: str, schema: dict[str, Any], answer: dict[str, Any], streams: bool = False) -> dict[str, Any]:
        responses = json_answer(answer)
        if streams:
            responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        return {"post": {"summary": summary, "requestBody": body, "responses": responses | errors}}

    def get(summary: str, content: dict[str, Any]) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": {"description": "The answer.", "content": content}} | errors}}

    models = {"type": "object", "properties": {"object": {"const": "list"}, "data": {"type": "array"}}, "required": ["object", "data"]}
    numbers = {"type": "object", "properties": {"tokens": {"type": "array"}}, "required": ["tokens"]}
    text = {"type": "object", "properties": {"prompt": {"type": "string"}}, "required": ["prompt"]}
    paths = {
        "/v1/models": get("Lists the models.", {"application/json": {"schema": models}}),
        "/v1/completions": post("Continues prompts.", COMPLETION, ANSWER, streams=True),
        "/v1/chat/completions": post("Answers a dialog.", CHAT, ANSWER, streams=True),
        "/tokenize": post("Turns text or a dialog into token ids.", TOKENIZE, numbers),
        "/detokenize": post("Turns token ids into text.", DETOKENIZE, text),
        "/tokenizer_info": get("Tells of the tokenizer.", {"application/json": {"schema": {"type": "object"}}}),
        "/health": get("Says whether requests are taken.", {"application/json": {"schema": {"type": "object"}}}),
        "/metrics": get("Gives figures for Prometheus.", {"text/plain": {"schema": {"type": "string"}}}),
    }
    whole: dict[str, Any] = {
        "openapi": "3.1.0", "info": {"title": "herd_jax", "version": "1", "description": "A model that is served."}, "paths": paths,
    }  # fmt: skip
    if has_keys:
        whole["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        whole["security"] = [{"key": []}]
    return whole
