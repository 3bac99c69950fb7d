"""Sends the requests of the security checks over plain HTTP, with any header and any body, also an incomplete one."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sgl_apr.errors import EngineError

ANSWER_TIMEOUT_S = 20.0
MAX_ANSWER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response.

    Attributes:
        status: The status.
        headers: The headers, with names in lower case.
        text: The body.
    """

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        """The body as JSON, or None if it is none."""
        with suppress(ValueError):
            return json.loads(self.text)
        return None


class HttpProbe:
    """Sends single requests to a server, each on a connection of its own.

    Args:
        url: The server, `http://` or `https://`.
        api_key: Sent as a bearer token.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = ANSWER_TIMEOUT_S) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise EngineError(f"{url} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise EngineError(f"found the URL {url}, expected http://HOST:PORT")
        self.host, self.port = host, port or (443 if parts.scheme == "https" else 80)
        self._base, self._tls = parts.path.rstrip("/"), parts.scheme == "https"
        self._api_key, self._timeout = api_key, timeout

    def send(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
        with_key: bool = True,
    ) -> Answer:
        """Send a request and return its answer.

        Args:
            path: The path.
            body: Sent as JSON. A body makes the request a POST.
            headers: Headers in addition to the usual ones, or in their place.
            method: GET or POST by default.
            with_key: Whether the key is sent.

        Raises:
            EngineError: The server cannot be reached or does not answer.
        """
        with self._connection() as connection:
            sent = self._headers(with_key) | ({} if body is None else {"Content-Type": "application/json"})
            data = None if body is None else json.dumps(body).encode()
            verb = method or ("GET" if body is None else "POST")
            try:
                connection.request(verb, self._base + path, data, sent | dict(headers or {}))
                response = connection.getresponse()
                text = response.read(MAX_ANSWER_BYTES).decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                raise EngineError(f"{path}: no answer ({error or type(error).__name__})") from error
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, text)

    @contextmanager
    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """Send a request and give its response inside the block. Leaving the block closes the connection."""
        with self._connection() as connection:
            headers = self._headers(True) | {"Content-Type": "application/json"}
            try:
                connection.request("POST", self._base + path, json.dumps(body).encode(), headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise EngineError(f"{path}: no answer ({error or type(error).__name__})") from error
            yield response

    def send_part(self, path: str, length: int, body: bytes, wait: float) -> tuple[str, float]:
        """Send the headers of a request and a part of its body, and wait for what the server does.

        Args:
            path: The path.
            length: The length that the headers announce.
            body: The part that is sent.
            wait: Seconds to wait.

        Returns:
            The first line of the answer, "" if the connection was closed without one, "no answer" after `wait`; and
            the seconds until then.
        """
        start = time.monotonic()
        headers = self._headers(True) | {
            "Host": f"{self.host}:{self.port}", "Content-Type": "application/json", "Content-Length": str(length),
        }  # fmt: skip
        head = f"POST {self._base}{path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        try:
            with self._socket() as connection:
                connection.settimeout(wait)
                connection.sendall(head.encode() + b"\r\n" + body)
                received = connection.recv(4096)
        except TimeoutError:
            return "no answer", time.monotonic() - start
        except OSError as error:
            if isinstance(error, ConnectionResetError | BrokenPipeError):
                return "", time.monotonic() - start
            raise EngineError(f"{path}: {error}") from error
        return received.decode(errors="replace").partition("\r\n")[0], time.monotonic() - start

    def _headers(self, with_key: bool) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._api_key}"} if self._api_key and with_key else {}

    def _socket(self) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), self._timeout)
        return (
            ssl.create_default_context().wrap_socket(connection, server_hostname=self.host)
            if self._tls
            else connection
        )

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self._timeout)
        try:
            yield connection
        finally:
            connection.close()
