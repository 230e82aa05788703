"""How much the server takes on, and from whom."""

import contextlib
import dataclasses
import hashlib
import hmac
from collections.abc import Iterator, Sequence

from herd_jax.errors import UserError
from herd_jax.serving.errors import Refused

RETRY_SECONDS = 2


@dataclasses.dataclass(frozen=True)
class Limits:
    """`max_requests`: answers that are computed or wait at the same time, of one model; `max_tokens`: of their prompts and answers together, at
    most; `max_body` in bytes; `timeout` and `drain_timeout` in seconds: of a request, and of those that are under way when the server ends."""

    max_requests: int = 512
    max_tokens: int = 1_000_000
    max_body: int = 8 * 2**20
    timeout: float = 600.0
    drain_timeout: float = 60.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise UserError(f"{field.name} is {value}: it must be more than 0")


class Gate:
    """Counts what is under way, and refuses what is too much."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.num_requests, self.num_tokens = limits, 0, 0

    @contextlib.contextmanager
    def enter(self, requests: int, tokens: int) -> Iterator[None]:
        """Takes on answers of so many tokens together. Raises Refused where that is too much for now, or for ever."""
        if requests > self.limits.max_requests or tokens > self.limits.max_tokens:
            most = f"{self.limits.max_requests} answers and {self.limits.max_tokens} tokens"
            raise Refused(413, f"the request asks for {requests} answers of up to {tokens} tokens together, and the server takes {most}: ask for less")
        if self.num_requests + requests > self.limits.max_requests or self.num_tokens + tokens > self.limits.max_tokens:
            raise Refused(429, "the server has as much to do as it takes on: try again in a while", None, "overloaded", RETRY_SECONDS)
        self.num_requests, self.num_tokens = self.num_requests + requests, self.num_tokens + tokens
        try:
            yield
        finally:
            self.num_requests, self.num_tokens = self.num_requests - requests, self.num_tokens - tokens


class Keys:
    """The API keys that are good; with none of them everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        if any(not key.strip() for key in keys):
            raise UserError("an API key is empty: give a long random text, such as `openssl rand -hex 32` prints")
        self._digests = [_digest(key.strip()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, header: str | None) -> None:
        """Raises Refused where there are keys and the Authorization header has none of them. Takes the same time whichever key is nearly right."""
        if not self._digests:
            return
        scheme, _, key = (header or "").partition(" ")
        found = [hmac.compare_digest(_digest(key.strip()), digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(found):
            raise Refused(401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'", None, "invalid_api_key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
