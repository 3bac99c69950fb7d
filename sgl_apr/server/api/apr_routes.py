"""Refuses requests with `apr` to routes that would ignore it."""

from __future__ import annotations

import re

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_apr.server.guard.refusal import RequestRefused, send_refusal

# The routes whose bodies may have `apr`. Our own have options at the top level.
APR_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
OWN_PREFIX = "/apr/"
NAME = re.compile(rb'"(?:a|\\u0061)(?:p|\\u0070)(?:r|\\u0072)"')  # of the field, as JSON may spell it


class AprRoutes:
    """Answers status 400 if the body of a request has `apr`, and its route does not take it. ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or takes_apr(scope["path"]) or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        first = await receive()  # the complete body: the checks before this one have read it
        if has_apr(first):
            routes = ", ".join(APR_PATHS)
            refusal = RequestRefused(
                f"{scope['path']} takes no `apr`, expected it in a request to one of {routes}", "apr"
            )
            await send_refusal(refusal, scope["path"], send, close=False)
            return

        async def replay() -> Message:
            nonlocal first
            message, first = first, {}
            return message or await receive()

        await self._app(scope, replay, send)


def takes_apr(path: str) -> bool:
    """Return whether a route honours `apr`, or has a body of its own."""
    return path in APR_PATHS or path.startswith(OWN_PREFIX)


def has_apr(message: Message) -> bool:
    """Return whether a message is a complete body that asks for a trajectory."""
    body: bytes = message.get("body", b"")
    if message.get("more_body") or not NAME.search(body):
        return False
    try:
        parsed = orjson.loads(body)
    except ValueError:
        return False
    return isinstance(parsed, dict) and parsed.get("apr") not in (None, False)
