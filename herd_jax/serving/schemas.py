"""What the server takes, as JSON schemas: the same that check a request's body stand in /openapi.json."""

from typing import Any

from herd_jax.inference.sampling import MAX_BIASES, MAX_LOG_PROBS

Schema = dict[str, Any]

MAX_SAMPLES, MAX_STOPS, MAX_PROMPTS, MAX_TOOLS = 128, 16, 1024, 128


def optional(schema: Schema) -> Schema:
    """Returns the schema of a field that may also be null, which is as if it were not there."""
    return {"anyOf": [schema, {"type": "null"}]}


def number(least: float | None = None, most: float | None = None, description: str = "") -> Schema:
    bounds = {name: value for name, value in (("minimum", least), ("maximum", most)) if value is not None}
    return optional({"type": "number"} | bounds | ({"description": description} if description else {}))


def integer(least: int | None = None, most: int | None = None) -> Schema:
    bounds = {name: value for name, value in (("minimum", least), ("maximum", most)) if value is not None}
    return optional({"type": "integer"} | bounds)


STRING, BOOLEAN, OBJECT = optional({"type": "string"}), optional({"type": "boolean"}), optional({"type": "object"})
TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}

RESPONSE_FORMAT = optional(
    {
        "oneOf": [
            {"type": "object", "properties": {"type": {"const": "text"}}, "required": ["type"], "additionalProperties": False},
            {
                "type": "object", "properties": {"type": {"const": "json_object"}, "schema": {"type": "object"}}, "required": ["type"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {
                    "type": {"const": "json_schema"},
                    "json_schema": {
                        "type": "object",
                        "properties": {"name": {"type": "string"}, "description": STRING, "schema": {"type": "object"}, "strict": BOOLEAN},
                        "required": ["schema"], "additionalProperties": False,
                    },
                },
                "required": ["type", "json_schema"], "additionalProperties": False,
            },
        ]
    }
)  # fmt: skip

SAMPLING: dict[str, Schema] = {
    "max_tokens": integer(0, 2**31 - 1),
    "temperature": number(0, 2),
    "top_p": optional({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": integer(-1, 2**31 - 1),
    "min_p": number(0, 1),
    "n": integer(1, MAX_SAMPLES),
    "seed": integer(-(2**63), 2**63 - 1),
    "stop": optional(
        {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS}]}
    ),
    "stop_token_ids": optional({"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": MAX_STOPS}),
    "ignore_eos": BOOLEAN,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": optional({"type": "number", "exclusiveMinimum": 0, "maximum": 10}),
    "logit_bias": optional(
        {
            "type": "object", "maxProperties": MAX_BIASES, "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
    "stream": BOOLEAN,
    "stream_options": optional({"type": "object", "properties": {"include_usage": BOOLEAN, "include_obfuscation": BOOLEAN}, "additionalProperties": False}),
    "response_format": RESPONSE_FORMAT,
    "guided_json": optional({"anyOf": [{"type": "object"}, {"type": "string"}]}),
    "guided_regex": STRING,
    "guided_choice": optional({"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}),
    "cache_salt": optional({"type": "string", "minLength": 1}),
    "user": STRING,  # nothing is made of these: clients send them
    "metadata": OBJECT,
    "store": BOOLEAN,
    "service_tier": STRING,
    "safety_identifier": STRING,
    "prompt_cache_key": STRING,
}  # fmt: skip

MODEL = {"type": "string", "description": "one of those that /v1/models lists; may be left out where there is one"}

COMPLETION: Schema = {
    "type": "object",
    "properties": {
        "model": MODEL,
        "prompt": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                TOKEN_IDS,
                {"type": "array", "items": TOKEN_IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        },
        "echo": BOOLEAN,
        "logprobs": integer(0, MAX_LOG_PROBS),
        "best_of": integer(1, MAX_SAMPLES),
        "add_special_tokens": BOOLEAN,
        **SAMPLING,
    },
    "required": ["prompt"],
    "additionalProperties": False,
}

TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$"}, "description": STRING, "parameters": OBJECT, "strict": BOOLEAN,
            },
            "required": ["name"], "additionalProperties": False,
        },
    },
    "required": ["type", "function"], "additionalProperties": False,
}  # fmt: skip

CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}, "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
        {"type": "null"},
    ]
}  # fmt: skip

MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": CONTENT,
        "name": STRING,
        "tool_call_id": STRING,
        "refusal": STRING,
        "reasoning_content": STRING,
        "tool_calls": optional(
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "id": STRING, "index": integer(), "type": {"const": "function"},
                        "function": {
                            "type": "object", "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
                            "required": ["name", "arguments"], "additionalProperties": False,
                        },
                    },
                    "required": ["function"], "additionalProperties": False,
                },
            }
        ),
    },
    "required": ["role"], "additionalProperties": False,
}  # fmt: skip

MESSAGES = {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": MAX_PROMPTS}

CHAT: Schema = {
    "type": "object",
    "properties": {
        "model": MODEL,
        "messages": MESSAGES,
        "max_completion_tokens": integer(1, 2**31 - 1),
        "logprobs": BOOLEAN,
        "top_logprobs": integer(0, MAX_LOG_PROBS),
        "tools": optional({"type": "array", "items": TOOL, "maxItems": MAX_TOOLS}),
        "tool_choice": optional(
            {
                "anyOf": [
                    {"enum": ["none", "auto", "required"]},
                    {
                        "type": "object",
                        "properties": {
                            "type": {"const": "function"},
                            "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False},
                        },
                        "required": ["type", "function"], "additionalProperties": False,
                    },
                ]
            }
        ),
        "parallel_tool_calls": BOOLEAN,
        **SAMPLING,
    },
    "required": ["messages"],
    "additionalProperties": False,
}  # fmt: skip

TOKENIZE: Schema = {
    "type": "object",
    "properties": {
        "model": MODEL, "prompt": {"type": "string"}, "content": {"type": "string"}, "messages": MESSAGES,
        "add_special_tokens": BOOLEAN, "add_special": BOOLEAN, "with_pieces": BOOLEAN,
    },
    "additionalProperties": False,
}  # fmt: skip

DETOKENIZE: Schema = {
    "type": "object",
    "properties": {"model": MODEL, "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
    "required": ["tokens"],
    "additionalProperties": False,
}
