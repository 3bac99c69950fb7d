"""Connects to MCP servers over streamable HTTP, with bounds on what a response may hold."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.runtime.tools.mcp_process import MAX_MESSAGE_BYTES
from sgl_apr.runtime.value_checks import shorten

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0  # between two pieces of a response; a call has its own limit


def check_url(url: object) -> str:
    """Return the URL of a server.

    Raises:
        AprError: It is no URL of HTTP.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        if parts is not None and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return str(url)
    except ValueError:  # of the port
        pass
    raise AprError(f"mcp url={shorten(url)}, expected http://HOST:PORT/PATH or https://")


@asynccontextmanager
async def http_transport(url: str, headers: Mapping[str, str]) -> AsyncIterator[tuple[Any, Any]]:
    """Yield the streams of messages from a server and to it.

    The transport of the `mcp` package bounds events, but not JSON responses. The client that it gets here bounds those.

    Args:
        url: The endpoint, such as `http://127.0.0.1:8000/mcp`.
        headers: Sent with every request, for example an API key.
    """
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    client = httpx2.AsyncClient(
        transport=_limited_transport(),
        headers={**headers, "accept-encoding": "identity"},
        timeout=httpx2.Timeout(CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
        trust_env=False,  # a proxy from the environment would be used without the limit
    )
    streams: AbstractAsyncContextManager[Any] = streamable_http_client(
        url, http_client=client, max_sse_event_size=MAX_MESSAGE_BYTES
    )
    async with client, streams as (read_stream, write_stream):
        yield read_stream, write_stream


def _limited_transport() -> Any:
    """Return a transport of httpx2 that ends JSON responses at `MAX_MESSAGE_BYTES`."""
    import httpx2

    class LimitedStream(httpx2.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self._stream:
                if (size := size + len(chunk)) > MAX_MESSAGE_BYTES:
                    raise httpx2.StreamError(f"the response has more than {MAX_MESSAGE_BYTES} bytes")
                yield chunk

        async def aclose(self) -> None:
            await self._stream.aclose()

    class LimitedTransport(httpx2.AsyncHTTPTransport):
        async def handle_async_request(self, request: Any) -> Any:
            response = await super().handle_async_request(request)
            if response.headers.get("content-encoding", "identity") != "identity":
                await response.aclose()
                raise httpx2.DecodingError("the response is compressed, which was not accepted")
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                response.stream = LimitedStream(response.stream)
            return response

    return LimitedTransport()
