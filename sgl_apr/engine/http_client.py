"""Single requests to a server, blocking or not. `HttpEngine` is the client that streams tokens."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import aiohttp

from sgl_apr.engine.http_errors import error_message, one_line
from sgl_apr.engine.http_response import (
    JSON_HEADERS,
    MAX_BODY_BYTES,
    MAX_ERROR_BYTES,
    decode_body,
    encode_body,
    read_error,
    read_json,
    too_large,
)
from sgl_apr.errors import EngineError, EngineTimeout

BODY_S = 30.0  # how much longer than its first byte a response may take to arrive completely


def post_json(url: str, body: Mapping[str, Any], *, api_key: str | None = None, timeout: float) -> Any:
    """Send JSON, block, and return the JSON of the response.

    Args:
        url: Where to send it.
        body: What to send.
        api_key: Sent as a bearer token.
        timeout: Seconds to wait for the server at each step. Redirects are not followed.

    Raises:
        EngineTimeout: The server did not answer in time.
        EngineError: No server answered, it answered with an error (`status` has the HTTP status), or the answer
            is not JSON.
    """
    headers = {**JSON_HEADERS, **_authorization(api_key)}
    answer = _send(url, encode_body(body), headers, "POST", timeout)
    try:
        return decode_body(answer)
    except ValueError as error:
        raise EngineError(f"no answer from {url}: {one_line(repr(error))}") from error


def get_json(url: str, *, api_key: str | None = None, timeout: float) -> Any:
    """Send a GET request, block, and return the JSON of the response. Arguments and errors as in `post_json`."""
    answer = _send(url, None, _authorization(api_key), "GET", timeout)
    try:
        return decode_body(answer)
    except ValueError as error:
        raise EngineError(f"no answer from {url}: {one_line(repr(error))}") from error


def check_exists(url: str, *, api_key: str | None = None, timeout: float) -> None:
    """Send a HEAD request, block, and raise as `post_json` does unless the response is a success."""
    _send(url, None, _authorization(api_key), "HEAD", timeout)


async def post_json_async(
    url: str, body: Mapping[str, Any], *, api_key: str | None = None, timeout: float = 300.0
) -> Any:
    """Like `post_json`, without blocking.

    Args:
        url: Where to send it.
        body: What to send.
        api_key: Sent as a bearer token.
        timeout: Seconds for the whole request.

    Raises:
        EngineTimeout: The server did not answer in time.
        EngineError: As in `post_json`.
    """
    limit, data = aiohttp.ClientTimeout(total=timeout), encode_body(body)
    headers = {**JSON_HEADERS, **_authorization(api_key)}
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=limit) as session,
            session.post(url, data=data, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise _refusal(url, response.status, await read_error(response))
            return await read_json(response)
    except TimeoutError as error:
        raise _silence(url, timeout) from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise EngineError(f"no answer from {url}: {one_line(repr(error))}") from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Raises a redirect as the `HTTPError` that it is: it could lead anywhere, and a POST would become a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _send(url: str, data: bytes | None, headers: Mapping[str, str], method: str, timeout: float) -> bytes:
    if not url.lower().startswith(("http://", "https://")):  # urllib also reads local files
        raise EngineError(f"no answer from {url}: expected a URL such as http://127.0.0.1:30000")
    opener = urllib.request.build_opener(_NoRedirects)
    began = time.monotonic()
    try:
        request = urllib.request.Request(url, data, dict(headers), method=method)
        with opener.open(request, timeout=timeout) as response:
            body = bytearray()
            while chunk := response.read1(1 << 16):
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large(url, "response", MAX_BODY_BYTES)
                if time.monotonic() - began > timeout + BODY_S:
                    raise _silence(url, timeout)
            if response.length:  # of what the server has announced, this is missing
                raise EngineError(f"no answer from {url}: it broke off the answer")
            return bytes(body)
    except urllib.error.HTTPError as error:
        with error:
            where = error.headers.get("Location") if 300 <= error.code < 400 else None
            text = (
                f"it redirects to {where}, expected the URL of the server itself"
                if where
                else error.read(MAX_ERROR_BYTES).decode(errors="replace")
            )
        raise _refusal(url, error.code, text) from error
    except TimeoutError as error:
        raise _silence(url, timeout) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError):
            raise _silence(url, timeout) from error
        raise EngineError(f"no answer from {url}: {one_line(error)}") from error


def _authorization(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _refusal(url: str, status: int, text: str) -> EngineError:
    return EngineError(f"{url}: {error_message(text, status)}", status)


def _silence(url: str, timeout: float) -> EngineTimeout:
    return EngineTimeout(f"{url} did not answer within {timeout:g} s")
