"""The refusal of a request, and the response that tells a client why."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.types import Send

CODES = {
    400: "invalid_value", 403: "origin_not_allowed", 408: "body_timeout", 413: "request_too_large",
    415: "unsupported_media_type", 421: "host_not_allowed", 503: "too_many_requests",
}  # fmt: skip
# What SGLang raises for a list that is empty or too short, or for a value of another type.
MISFIT_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)
RETRY_AFTER = b"1"  # seconds


class RequestRefused(ValueError):
    """A request is refused before the engine sees it. SGLang answers a ValueError with status 400.

    Attributes:
        status: The HTTP status.
        param: The field of the request that is wrong, if one is.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def __reduce__(self) -> tuple[type[RequestRefused], tuple[str, str | None, int]]:
        return type(self), (str(self), self.param, self.status)


def misfit(error: Exception) -> RequestRefused:
    """Return the refusal of a request for which SGLang raised one of `MISFIT_ERRORS`."""
    found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return RequestRefused(f"the fields of the request do not fit one another ({found})")


def over_limit(
    name: str, value: object, flag: str, limit: object, param: str | None = None
) -> RequestRefused:
    """Return the refusal of a request that is above a limit. The message names the flag."""
    return RequestRefused(f"{name} is {value}, expected at most {limit} ({flag})", param)


def refusal_body(refusal: RequestRefused, path: str = "") -> dict[str, Any]:
    """Return OpenAI's error object. Anthropic's routes have a field `type` in addition."""
    error = {
        "message": str(refusal),
        "type": "invalid_request_error" if refusal.status < 500 else "server_error",
        "param": refusal.param,
        "code": CODES.get(refusal.status, "invalid_value"),
    }
    return {"type": "error", "error": error} if path.startswith("/v1/messages") else {"error": error}


async def send_refusal(refusal: RequestRefused, path: str, send: Send, *, close: bool) -> None:
    """Send a refusal as a response.

    Args:
        refusal: The refusal.
        path: The path of the request.
        send: The ASGI function.
        close: Whether the connection is closed afterwards, because the body was not read. The response is then left
            open: send its last part when the rest of the body was discarded.
    """
    body = orjson.dumps(refusal_body(refusal, path))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if close:
        headers.append((b"connection", b"close"))
    if refusal.status == 503:
        headers.append((b"retry-after", RETRY_AFTER))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": close})
