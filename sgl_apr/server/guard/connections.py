"""Closes connections that send no complete headers, and refuses connections above the limit.

uvicorn has neither: it waits for headers without end, and its own limit is checked after them.
"""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import Any

import orjson

from sgl_apr.server.guard.limits import GuardLimits
from sgl_apr.server.guard.refusal import RequestRefused, refusal_body
from sgl_apr.server.hooks import hook_after, require_sglang

PROTOCOLS = {
    "h11": "uvicorn.protocols.http.h11_impl:H11Protocol",
    "httptools": "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol",
}


def connection_hooks(limits: GuardLimits) -> list[str]:
    """Set the hooks on uvicorn's protocols.

    Returns:
        The functions with a hook. `HookRegistry.apply_hooks` puts them into effect.

    Raises:
        LaunchError: uvicorn's protocols are not as expected.
    """

    def connection_made(result: None, protocol: Any, transport: Any) -> None:
        watch_connection(protocol, transport, limits)

    paths = [f"{path}.connection_made" for library, path in PROTOCOLS.items() if find_spec(library)]
    for path in paths:
        require_sglang(path.removesuffix(".connection_made") + "._unset_keepalive_if_required")
        hook_after(path, ["transport"], connection_made)
    return paths


def watch_connection(protocol: Any, transport: Any, limits: GuardLimits) -> None:
    """Refuse a new connection if there are too many, else close it when headers do not arrive.

    Args:
        protocol: uvicorn's protocol of the connection.
        transport: Its transport.
        limits: The operator's limits.
    """
    if len(protocol.connections) > limits.connections:
        transport.write(_too_many(len(protocol.connections), limits))
        transport.close()
    else:
        HeaderTimer(protocol, limits.header_timeout).start()


class HeaderTimer:
    """Closes a connection on which headers have not been complete for some time.

    uvicorn itself closes a connection that is idle after a response. So a connection without a running request and
    without that timer waits for headers.

    Args:
        protocol: uvicorn's protocol of the connection.
        timeout_s: Seconds in which headers have to arrive. They are noticed within twice that time.
    """

    def __init__(self, protocol: Any, timeout_s: float) -> None:
        self._protocol, self._timeout_s = protocol, timeout_s
        self._cycle: Any = None
        self._waited = True  # a new connection waits for headers

    def start(self) -> None:
        """Check the connection after the time limit."""
        asyncio.get_running_loop().call_later(self._timeout_s, self._check)

    def _check(self) -> None:
        protocol = self._protocol
        if protocol.transport is None or protocol.transport.is_closing():
            return
        if protocol.transport.get_protocol() is not protocol:  # a WebSocket now
            return
        cycle = protocol.cycle
        waits = (cycle is None or cycle.response_complete) and protocol.timeout_keep_alive_task is None
        if waits and self._waited and cycle is self._cycle:
            protocol.transport.close()
            return
        self._cycle, self._waited = cycle, waits
        self.start()


def _too_many(connections: int, limits: GuardLimits) -> bytes:
    refusal = RequestRefused(
        f"{connections} connections are open, expected at most {limits.connections} (--apr-max-connections)",
        status=503,
    )
    body = orjson.dumps(refusal_body(refusal))
    head = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body
