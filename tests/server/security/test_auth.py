"""The middleware answers what SGLang's check of keys leaves open."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sgl_apr.server.security.auth import AuthorizationMiddleware


def answer(scope: dict[str, Any], api_key: str | None) -> object:
    """What the middleware sends first; "passed" if it passes the request on."""
    sent: list[Any] = []

    async def app(*_: object) -> None:
        sent.append("passed")

    async def send(message: Any) -> None:
        sent.append(message.get("status") or message.get("code") or "")

    asyncio.run(AuthorizationMiddleware(app, api_key=api_key)(scope, None, send))  # type: ignore[arg-type]
    return sent[0]


@pytest.mark.parametrize(
    ("headers", "query", "expected"),
    [
        ([], b"", "passed"),
        ([(b"authorization", b"Bearer K")], b"a=%ff", "passed"),
        ([(b"authorization", b"Bearer \xe9")], b"", 401),
        ([(b"authorization", b"Bearer K"), (b"Authorization", b"\xff")], b"", 401),
        ([], b"\xff", 400),
    ],
)
def test_http(headers: list[tuple[bytes, bytes]], query: bytes, expected: object):
    assert answer({"type": "http", "headers": headers, "query_string": query}, "K") == expected


@pytest.mark.parametrize(
    ("headers", "key", "expected"),
    [
        ([], "K", 1008),
        ([(b"authorization", b"Bearer K")], "K", "passed"),
        ([(b"authorization", b"bearer K")], "K", "passed"),
        ([(b"authorization", b"Bearer k")], "K", 1008),
        ([(b"authorization", b"Basic K")], "K", 1008),
        ([], None, "passed"),
    ],
)
def test_websockets(headers: list[tuple[bytes, bytes]], key: str | None, expected: object):
    assert answer({"type": "websocket", "headers": headers}, key) == expected
