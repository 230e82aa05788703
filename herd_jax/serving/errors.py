"""What a client is told that cannot be answered, in the form that OpenAI's clients know."""

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is not answered; `field` names what is wrong in it. `retry_after` in seconds."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.retry_after = status, message, field, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code or self.status}}

    @property
    def headers(self) -> dict[str, str]:
        extra = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return extra | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad(message: str, field: str | None = None, code: str | None = None) -> Refused:
    """Returns the refusal of a request that is wrong in itself."""
    return Refused(400, message, field, code)
