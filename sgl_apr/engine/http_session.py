"""Opens the HTTP session of an engine, with timeouts and connections for many requests in parallel."""

from __future__ import annotations

import aiohttp

KEEPALIVE_S = 1.0  # SGLang closes an idle connection after 5 (SGLANG_TIMEOUT_KEEP_ALIVE)


def open_session(api_key: str | None, read_timeout: float) -> aiohttp.ClientSession:
    """Return a new session.

    Args:
        api_key: Sent as a bearer token.
        read_timeout: The longest time, in seconds, between two chunks of a response.
    """
    # A server connects at once, but an event loop that starts hundreds of requests may get to it late.
    limits = aiohttp.ClientTimeout(
        total=None, sock_connect=max(10.0, read_timeout / 10), sock_read=read_timeout
    )
    # No limit on connections: the branches of a trajectory must not wait for one another here. Idle connections are
    # closed long before the server closes them, because a request sent at that moment would be lost.
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=limits,
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        read_bufsize=1 << 20,
    )
