"""Reads the body of a request within limits on its bytes, its time, and the number of slow ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.refusal import RequestRefused

SLOW_AFTER_S = 1.0  # a body that takes longer counts as slow
SLOW_MEMORY_FACTOR = 8  # slow bodies hold at most this many times the bytes of the largest allowed body
DISCARD_S = 1.0  # how long the rest of a refused body is read, so that the client reads the response


class BodyReader:
    """Reads bodies, and counts those that arrive slowly.

    Attributes:
        slow: Bodies that take longer than a second, now.
        slow_bytes: What has arrived of them.
    """

    def __init__(self, limits: GuardLimits) -> None:
        self.slow = 0
        self.slow_bytes = 0
        self._limits = limits

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive, max_bytes: int) -> bytes:
        """Return the complete body.

        Args:
            headers: The headers by name, in lower case.
            receive: The ASGI function.
            max_bytes: The largest allowed body.

        Raises:
            RequestRefused: The body is too large (413) or takes too long (408), or too many bodies are slow (503).
            ClientDisconnect: The client has disconnected.
        """
        length = headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > max_bytes:
            raise _too_large(f"{int(length[:20])} bytes", max_bytes)
        started, chunks, size = time.monotonic(), list[bytes](), 0
        is_slow = False
        try:
            while True:
                limit_s = self._limits.body_timeout if is_slow else SLOW_AFTER_S
                remaining = started + min(limit_s, self._limits.body_timeout) - time.monotonic()
                try:
                    async with asyncio.timeout(max(remaining, 0.001)):
                        message = await receive()
                except TimeoutError:
                    if is_slow or self._limits.body_timeout <= SLOW_AFTER_S:
                        raise RequestRefused(
                            f"the body was not complete after {self._limits.body_timeout:g} s (--apr-body-timeout)",
                            status=408,
                        ) from None
                    is_slow = True
                    self.slow += 1
                    self.slow_bytes += size
                    self._check_slow(max_bytes)
                    continue
                if message["type"] != "http.request":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(f"more than {max_bytes} bytes", max_bytes)
                if is_slow:
                    self.slow_bytes += len(chunk)
                    self._check_slow(max_bytes)
                if not message.get("more_body", False):
                    return chunk if not chunks else b"".join([*chunks, chunk])
                chunks.append(chunk)
        finally:
            if is_slow:
                self.slow -= 1
                self.slow_bytes -= size

    def _check_slow(self, max_bytes: int) -> None:
        limit = self._limits.slow_bodies
        if self.slow > limit or self.slow_bytes > SLOW_MEMORY_FACTOR * max_bytes:
            raise RequestRefused(
                f"{self.slow} bodies arrive slowly, expected at most {limit} (--apr-max-slow-bodies)",
                status=503,
            )


async def discard_body(receive: Receive) -> None:
    """Read the rest of a refused body for a moment.

    If the connection were closed at once, the client's system could drop the response before the client reads it.
    """

    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass


def _too_large(found: str, max_bytes: int) -> RequestRefused:
    return RequestRefused(
        f"the body has {found}, expected at most {max_bytes} (--apr-max-body-bytes)", status=413
    )
