"""Single requests to a server, blocking or not. `HttpEngine` is the client that streams tokens."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import aiohttp

from sgl_apr.engine.http_errors import error_message
from sgl_apr.errors import EngineError, EngineTimeout


def post_json(url: str, body: Mapping[str, Any], *, api_key: str | None = None, timeout: float) -> Any:
    """Send JSON, block, and return the JSON of the response.

    Args:
        url: Where to send it.
        body: What to send.
        api_key: Sent as a bearer token.
        timeout: Seconds to wait for the server at each step.

    Raises:
        EngineTimeout: The server did not answer in time.
        EngineError: No server answered, it answered with an error (`status` has the HTTP status), or the answer
            is not JSON.
    """
    headers = {"Content-Type": "application/json", **_authorization(api_key)}
    answer = _send(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout)
    try:
        return json.loads(answer)
    except ValueError as error:
        raise EngineError(f"no answer from {url}: {error!r}") from error


def check_exists(url: str, *, api_key: str | None = None, timeout: float) -> None:
    """Send a HEAD request, block, and raise as `post_json` does unless the response is a success."""
    _send(urllib.request.Request(url, headers=_authorization(api_key), method="HEAD"), timeout)


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
    limit = aiohttp.ClientTimeout(total=timeout)
    try:
        async with (
            aiohttp.ClientSession(headers=_authorization(api_key), timeout=limit) as session,
            session.post(url, json=body) as response,
        ):
            if response.status != 200:
                raise _refusal(url, response.status, await response.text())
            return await response.json()
    except TimeoutError as error:
        raise _silence(url, timeout) from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise EngineError(f"no answer from {url}: {error!r}") from error


def _send(request: urllib.request.Request, timeout: float) -> bytes:
    url = request.full_url
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer: bytes = response.read()
            return answer
    except urllib.error.HTTPError as error:
        raise _refusal(url, error.code, error.read().decode(errors="replace")) from error
    except TimeoutError as error:
        raise _silence(url, timeout) from error
    except OSError as error:
        raise EngineError(f"no answer from {url}: {error}") from error


def _authorization(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _refusal(url: str, status: int, text: str) -> EngineError:
    return EngineError(f"{url}: {error_message(text, status)}", status)


def _silence(url: str, timeout: float) -> EngineTimeout:
    return EngineTimeout(f"{url} did not answer within {timeout:g} s")
