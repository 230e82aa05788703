"""From a request's body to what the engine is asked."""

import json
import secrets
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from herd_jax.errors import UserError
from herd_jax.inference.engine.grammar import Grammar
from herd_jax.inference.sampling import Sampling
from herd_jax.serving.errors import bad

Body = dict[str, Any]


def check(validator: jsonschema.Draft202012Validator, body: Any) -> Body:
    """Returns the body without what is null, which is as if it were not there. Raises Refused, which names the field, where it is not what the
    schema says."""
    error = best_match(validator.iter_errors(body))
    if error is None:
        return {name: value for name, value in body.items() if value is not None}
    path = [str(part) for part in error.absolute_path]
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        unknown = sorted(name for name in error.instance if name not in known)
        if unknown and known:
            field = ".".join([*path, unknown[0]])
            raise bad(f"there is no parameter '{field}': leave it out", field, "unknown_parameter")
    if error.validator == "required":
        field = ".".join([*path, error.message.split("'")[1]])
        raise bad(f"'{field}' is missing: give it", field, "missing_required_parameter")
    field = ".".join(path)
    what = f"'{field}'" if field else "the body"
    raise bad(f"{what} cannot be {_short(error.instance)}: {_wanted(error)}", field or None, "invalid_value")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _wanted(error: jsonschema.ValidationError) -> str:
    message = error.message.removeprefix(repr(error.instance)).strip()
    return message[:200] if message else "it is not what the documentation says"


def sampling(body: Body, default_max_tokens: int) -> Sampling:
    """Returns how the answers are drawn, with OpenAI's defaults; without a seed one is drawn."""
    stop, seed = body.get("stop", ()), body.get("seed")
    names = ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos")
    given = {name: body[name] for name in names if name in body}
    try:
        return Sampling(
            max_new_tokens=max(1, body.get("max_tokens", default_max_tokens)),
            temperature=body.get("temperature", 1.0),
            seed=secrets.randbits(64) if seed is None else int(seed) % 2**64,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_ids=tuple(map(int, body.get("stop_token_ids", ()))),
            top_k=max(0, int(body.get("top_k", 0))),
            logit_bias={int(token): bias for token, bias in body.get("logit_bias", {}).items()},
            log_probs=body.get("logprobs"),
            **given,
        )
    except UserError as error:
        raise bad(str(error), str(error).split()[0]) from error


def grammar(body: Body) -> Grammar | None:
    """Returns what the answers must follow."""
    asked = [name for name in ("guided_json", "guided_regex", "guided_choice") if name in body]
    form = body.get("response_format", {"type": "text"})
    if form["type"] != "text":
        asked.append("response_format")
    if len(asked) > 1:
        raise bad(f"'{asked[0]}' and '{asked[1]}' contradict each other: give one of them", asked[1], "contradiction")
    match asked:
        case ["response_format"]:
            schema = form.get("schema", {"type": "object"}) if form["type"] == "json_object" else form["json_schema"]["schema"]
            return Grammar.json_schema(schema)
        case ["guided_json"]:
            schema = body["guided_json"]
            try:
                return Grammar.json_schema(json.loads(schema) if isinstance(schema, str) else schema)
            except ValueError as error:
                raise bad(f"'guided_json' is not JSON ({error}): correct it", "guided_json", "invalid_value") from error
        case ["guided_regex"]:
            return Grammar.regex(body["guided_regex"])
        case ["guided_choice"]:
            return Grammar.choice(body["guided_choice"])
    return None


def check_stream(body: Body) -> None:
    if "stream_options" in body and not body.get("stream"):
        raise bad("'stream_options' is for 'stream': true; leave it out, or set 'stream'", "stream_options", "contradiction")
