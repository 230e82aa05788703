"""How tokens and their log-probabilities are shown."""

from collections.abc import Sequence
from typing import Any

from herd_jax.inference.engine.requests import LogProb
from herd_jax.text.tokenizer import Tokenizer

LEAST = -9999.0  # in place of minus infinity, which JSON does not have


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Returns the bytes of a token; of a special token those of its name."""
    names = {i: name for name, i in tokenizer.special_ids.items()}
    if token in names:
        return names[token].encode()
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns a token as text, other for each token of other bytes; one that is a part of a character as "bytes:\\\\xe2"."""
    content = token_bytes(tokenizer, token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def completion_log_probs(tokenizer: Tokenizer, log_probs: Sequence[LogProb], number: int, begin: Sequence[int] = (), offset: int = 0) -> dict[str, Any]:
    """Returns log-probabilities as /v1/completions gives them. `begin`: ids before the first that has one; `offset`: characters before them."""
    ids = [*begin, *(one.id for one in log_probs)]
    texts = [token_text(tokenizer, token) for token in ids]
    offsets = []
    for token in ids:
        offsets.append(offset)
        offset += len(token_bytes(tokenizer, token).decode(errors="ignore"))
    values = [None] * len(begin) + [max(one.raw, LEAST) for one in log_probs]
    tops: list[dict[str, float] | None] = [None] * len(begin)
    for one in log_probs:
        top = {token_text(tokenizer, token): max(raw, LEAST) for token, raw, _ in one.likeliest[:number]}
        tops.append(top | {token_text(tokenizer, one.id): max(one.raw, LEAST)})
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops if number else None, "text_offset": offsets}


def chat_log_probs(tokenizer: Tokenizer, log_probs: Sequence[LogProb], number: int) -> dict[str, Any]:
    """Returns log-probabilities as /v1/chat/completions gives them."""

    def entry(token: int, raw: float) -> dict[str, Any]:
        return {"token": token_text(tokenizer, token), "logprob": max(raw, LEAST), "bytes": list(token_bytes(tokenizer, token))}

    content = [entry(one.id, one.raw) | {"top_logprobs": [entry(token, raw) for token, raw, _ in one.likeliest[:number]]} for one in log_probs]
    return {"content": content, "refusal": None}
