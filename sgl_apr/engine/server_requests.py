"""Requests to an SGLang server other than those that decode: what it reports, and chat messages as token ids."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from sgl_apr.engine.http_errors import error_message
from sgl_apr.errors import AprError, EngineError, UnsupportedEngine


class ServerRequests(ABC):
    """Sends single requests to a server or its replicas."""

    url: str
    _session: aiohttp.ClientSession

    @abstractmethod
    def _servers(self) -> list[str]:
        """Return the servers to send to what a router does not forward."""

    @abstractmethod
    def _errors(self, url: str = "") -> contextlib.AbstractContextManager[None]:
        """Translate exceptions of the HTTP library."""

    async def _get(self, path: str, url: str = "") -> dict[str, Any]:
        url = url or self.url
        with self._errors(url):
            async with self._session.get(url + path) as response:
                if response.status != 200:
                    raise EngineError(f"{url}{path} answered {response.status}", response.status)
                data: dict[str, Any] = await response.json()
        return data

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of chat messages, rendered by the server as for a chat completion.

        Raises:
            UnsupportedEngine: The model has no chat template.
            AprError: The server refuses the messages.
            EngineError: The server failed.
        """
        url = self._servers()[0]
        with self._errors(url):
            async with self._session.post(f"{url}/tokenize", json={"messages": list(messages)}) as response:
                if response.status != 200:
                    raise _refusal(error_message(await response.text(), response.status), response.status)
                return [int(i) for i in (await response.json())["tokens"]]


def _refusal(message: str, status: int) -> AprError:
    if status >= 500 or status in (401, 403, 404):
        return EngineError(message, status)
    if "chat_template is not set" in message or "chat template" in message.lower():
        return UnsupportedEngine(
            f"the model has no chat template, expected a prompt that is text or token ids, or a server that was "
            f"started with --chat-template ({message})"
        )
    return AprError(f"the chat messages cannot be rendered: {message}")
