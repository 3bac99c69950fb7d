"""Errors as HTTP responses, in the shapes of OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec

import orjson
from fastapi import Response
from starlette.requests import ClientDisconnect

from sgl_apr.engine.sglang_names import CACHE_MISS_STATUS
from sgl_apr.errors import AprError, EngineError, EngineTimeout
from sgl_apr.server.api.admission import ServerBusy

P = ParamSpec("P")
HTTP_CLIENT_CLOSED_REQUEST = 499  # nobody reads it
log = logging.getLogger(__name__)


def respond_with(
    make_body: Callable[[BaseException], tuple[dict[str, Any], int]],
) -> Callable[[Callable[P, Awaitable[Response]]], Callable[P, Awaitable[Response]]]:
    """Return a decorator that makes a handler return a response for every exception that it raises.

    Args:
        make_body: Returns the body of the response for an exception, and its status.
    """

    def decorate(handler: Callable[P, Awaitable[Response]]) -> Callable[P, Awaitable[Response]]:
        @functools.wraps(handler)
        async def handle(*args: P.args, **kwargs: P.kwargs) -> Response:
            try:
                return await handler(*args, **kwargs)
            except ClientDisconnect:
                return Response(status_code=HTTP_CLIENT_CLOSED_REQUEST)
            except Exception as error:
                body, status = make_body(error)
                headers = {"Retry-After": str(error.retry_after)} if isinstance(error, ServerBusy) else None
                return json_response(body, status, headers)

        return handle

    return decorate


def error_body(error: BaseException) -> tuple[dict[str, Any], int]:
    """Return an error as OpenAI's error object, and its HTTP status.

    The status is 4xx if the client can mend the request, else 5xx. The object's `code` is the name of the exception.
    """
    if isinstance(error, ServerBusy):
        status = 503
    elif isinstance(error, EngineTimeout):
        status = 504
    elif isinstance(error, EngineError):
        status = error.status or 500
        # A cache miss has a meaning only between the runtime and the cache.
        if not 400 <= status < 600 or status == CACHE_MISS_STATUS:
            status = 500
    elif isinstance(error, AprError):
        status = 400
    else:
        log.error("a trajectory failed", exc_info=error)
        status = 500
    message, code = "internal server error", "internal_error"
    if isinstance(error, AprError):
        message, code = str(error), re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}, status


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with a JSON body."""
    return Response(orjson.dumps(content), status, headers, "application/json")


respond_to_errors = respond_with(error_body)
