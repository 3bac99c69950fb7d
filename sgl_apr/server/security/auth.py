"""Closes what SGLang's check of API keys leaves open: WebSockets, and header bytes that end in status 500.

SGLang checks the keys of HTTP requests only, so that anybody may open `/v1/realtime` on a server with a key. It
compares the key as text, which fails with status 500 for text that is not ASCII.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sgl_apr.server.hooks import hook_around

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def register_hooks() -> None:
    """Add `AuthorizationMiddleware` where SGLang adds its check of keys."""
    hook_around("sglang.srt.utils.auth:add_api_key_middleware", ["app"], _add_middleware)


def _add_middleware(original: Any, app: Any, *, api_key: str | None, admin_api_key: str | None) -> None:
    original(app, api_key=api_key, admin_api_key=admin_api_key)
    app.add_middleware(AuthorizationMiddleware, api_key=api_key)


class AuthorizationMiddleware:
    """Answers requests that SGLang's own middleware does not check, or fails to check. ASGI.

    Args:
        app: The application.
        api_key: The ordinary key of the server. None admits WebSockets of anybody, as SGLang admits requests.
    """

    def __init__(self, app: Any, *, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "http":
            if not all(value.isascii() for value in _header_values(scope, b"authorization")):
                await _send_error(send, 401, "Unauthorized")
                return
            if not _is_utf8(scope["query_string"]):
                await _send_error(send, 400, "the query of the URL is not UTF-8")
                return
        elif scope["type"] == "websocket" and self._api_key and not _has_key(scope, self._api_key):
            await send({"type": "websocket.close", "code": 1008, "reason": "Unauthorized"})
            return
        await self._app(scope, receive, send)


def _header_values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key.lower() == name]


def _has_key(scope: Scope, api_key: str) -> bool:
    scheme, _, key = next(iter(_header_values(scope, b"authorization")), b"").partition(b" ")
    return scheme.lower() == b"bearer" and secrets.compare_digest(key, api_key.encode())


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


async def _send_error(send: Send, status: int, message: str) -> None:
    body = b'{"error": "%s"}' % message.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
