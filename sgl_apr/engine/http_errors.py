"""Translates exceptions of the HTTP library and error responses of a server into this package's exceptions."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator

import aiohttp

from sgl_apr.errors import EngineError, EngineTimeout


@contextlib.contextmanager
def translate_errors(
    url: str, connect_s: float, read_s: float, on_failure: Callable[[Exception], None] | None
) -> Iterator[None]:
    """Raise every exception of the HTTP library as an `EngineError`.

    Args:
        url: The server, for the message.
        connect_s: The limit for a connection, in seconds, for the message.
        read_s: The limit between two chunks, in seconds, for the message.
        on_failure: Called with the error if the connection failed or broke.

    Raises:
        EngineTimeout: The server did not connect or respond in time.
        EngineError: Anything else went wrong.
    """
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise EngineTimeout(f"{url} took no connection within {connect_s:g} s") from error
    except (aiohttp.ServerTimeoutError, TimeoutError) as error:
        raise EngineTimeout(f"{url} did not answer within {read_s:g} s ({error})") from error
    except aiohttp.ClientConnectorError as error:
        if on_failure:
            on_failure(error)
        raise EngineError(f"no server at {url}: {one_line(error)}") from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
        if on_failure:
            on_failure(error)
        raise EngineError(f"{url} broke off the answer: {one_line(error) or type(error).__name__}") from error
    except (aiohttp.ClientError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise EngineError(f"{url} does not answer like an SGLang server: {one_line(repr(error))}") from error


def error_message(text: str, status: int) -> str:
    """Return the message of an error response in one line.

    Examples:
        >>> error_message('{"error": {"message": "out of memory"}}', 500)
        'the server answered 500: out of memory'
        >>> error_message('{"message": "no such model"}', 400)
        'the server answered 400: no such model'

    Args:
        text: The body of the response, JSON in one of the shapes that SGLang sends, or text.
        status: The HTTP status.
    """
    try:
        body = json.loads(text)
        error = body.get("error", body)
        text = str(error.get("message", text) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        pass
    return f"the server answered {status}: {one_line(text)}"


def one_line(message: object) -> str:
    """Return a message of a server or library in one line of at most 300 characters."""
    return " ".join(str(message).split())[:300]
