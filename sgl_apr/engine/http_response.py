"""Reads responses of a server within limits of size and time, whatever the server sends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import aiohttp
import orjson

from sgl_apr.errors import AprError, EngineError

# A line of a stream holds all ids and log-probabilities so far, which can be megabytes; a hostile one never ends.
MAX_LINE_BYTES = 64 << 20
MAX_BODY_BYTES = 64 << 20  # after decompression
MAX_ERROR_BYTES = 64 << 10  # read of the body of an error
# A request with an object that is no JSON is refused, in place of being written in a form of orjson's own.
ORJSON_OPTIONS = (
    orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS
)
JSON_HEADERS = {"Content-Type": "application/json"}
AFTER_DONE_S = 5.0  # how long the end of a stream is waited for after its last data


def encode_body(body: Mapping[str, Any]) -> bytes:
    """Return a request as JSON.

    Raises:
        AprError: It holds something that JSON does not have, such as a set or NaN.
    """
    with contextlib.suppress(TypeError):  # also for what JSON has, such as numbers of more than 64 bits
        encoded = orjson.dumps(body, option=ORJSON_OPTIONS)
        if b"null" not in encoded:  # NaN becomes null there
            return encoded
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise AprError(f"the request cannot be written as JSON: {error}") from None


def decode_body(body: bytes) -> Any:
    """Return the JSON of a response.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        return orjson.loads(body)
    except ValueError:  # it may have NaN, which SGLang's own routes do not send
        pass
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError(f"nested too deeply: {error}") from None


async def read_json(response: aiohttp.ClientResponse) -> Any:
    """Return the JSON of a response.

    Raises:
        EngineError: The response is too large.
        ValueError: It is not JSON.
    """
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large(str(response.url), "response", MAX_BODY_BYTES)
    return decode_body(bytes(body))


async def read_object(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Return the JSON object of a response. Raises as `read_json`, and `ValueError` for JSON that is no object."""
    data = await read_json(response)
    if not isinstance(data, dict):
        raise ValueError(f"found {type(data).__name__}, expected a JSON object")
    return data


async def read_error(response: aiohttp.ClientResponse) -> str:
    """Return the beginning of the body of an error response as text. For a redirect, where it leads."""
    if response.status in (301, 302, 303, 307, 308):
        return f"it redirects to {response.headers.get('Location', 'nothing')}, expected the URL of the server itself"
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    return body[:MAX_ERROR_BYTES].decode(errors="replace")


async def data_lines(response: aiohttp.ClientResponse, silence_s: float) -> AsyncGenerator[bytes, None]:
    """Yield the data of each event of a stream (server-sent events), without the final `[DONE]`.

    Args:
        response: The response.
        silence_s: The longest time, in seconds, between two events with data. Comments, which a server may send to keep
            a connection open, do not count.

    Raises:
        TimeoutError: No data came in time.
        EngineError: A line is too long.
    """
    now = asyncio.get_running_loop().time
    deadline, is_done = now() + silence_s, False
    buffer, searched = bytearray(), 0  # `searched` bytes of the buffer have no line break
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await response.content.readany()
        except TimeoutError:
            if is_done:
                return
            raise
        buffer += chunk or b"\n"
        start = 0
        while (end := buffer.find(b"\n", max(start, searched))) >= 0:
            line, start = bytes(buffer[start:end]), end + 1
            data = line[5:].strip() if line.startswith(b"data:") and not is_done else b""
            if data == b"[DONE]":
                is_done, deadline = True, now() + min(silence_s, AFTER_DONE_S)
            elif data:
                yield data
                deadline = now() + silence_s
        del buffer[:start]
        searched = len(buffer)
        if not chunk:
            return
        if searched > MAX_LINE_BYTES:
            raise too_large(str(response.url), "line", MAX_LINE_BYTES)


def too_large(url: str, what: str, max_bytes: int) -> EngineError:
    """Return the error of a response that is larger than any that SGLang sends."""
    return EngineError(
        f"{url} does not answer like an SGLang server: a {what} of more than {max_bytes >> 20} MiB"
    )
