"""Decides for each request to a route of SGLang whether it is a trajectory, and hands it to what answers it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sgl_apr.server.api import http
from sgl_apr.server.api.compatible import http_apis
from sgl_apr.server.api.config import ApiConfig
from sgl_apr.server.api.openai.fields import OPENAI_FIELDS
from sgl_apr.server.api.openai.model_alias import ALIAS_SUFFIX, has_alias
from sgl_apr.server.api.openai.request import field_defaults

Original = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class RequestHandlers:
    """Hooks around the methods with which SGLang's serving objects answer a request.

    Attributes:
        config: The operator's settings.
        chat: SGLang's class for chat completions.
        completion: SGLang's class for text completions.
    """

    config: ApiConfig
    chat: type
    completion: type

    async def completion_request(
        self, original: Original, serving: Any, request: Any, raw_request: Any
    ) -> Any:
        """Answer a chat completion or text completion."""
        if raw_request is None or not isinstance(serving, (self.chat, self.completion)):
            return await original(serving, request, raw_request)
        is_chat, model = isinstance(serving, self.chat), request.model
        body = await raw_request.json()  # FastAPI has parsed the body already and keeps it
        apr = _requested_options(body, request, serving)
        if apr is None and self.config.all_chats and is_chat and body.get("apr") is not False:
            # Without a parser only SGLang can answer: with the calls as text.
            has_no_parser = bool(request.tools) and getattr(serving, "tool_call_parser", None) is None
            is_refused = has_no_parser or OPENAI_FIELDS.refuses(body, field_defaults(request))
            apr = None if is_refused else {}
        if apr is None:
            return await original(serving, request, raw_request)
        return await http.openai_completion(
            serving, request, raw_request, body, apr, model=model, chat=is_chat
        )

    async def response_request(
        self, original: Original, serving: Any, request: Any, raw_request: Any = None
    ) -> Any:
        """Answer a request of the Responses API."""
        return await self._answer(http_apis.openai_response, serving, original, serving, request, raw_request)

    async def message_request(self, original: Original, serving: Any, request: Any, raw_request: Any) -> Any:
        """Answer a request of Anthropic's Messages API."""
        chat = serving.openai_serving_chat
        return await self._answer(http_apis.anthropic_message, chat, original, serving, request, raw_request)

    @staticmethod
    async def _answer(
        handler: Callable[..., Awaitable[Any]],
        chat: Any,
        original: Original,
        serving: Any,
        request: Any,
        raw_request: Any,
    ) -> Any:
        if raw_request is None:
            return await original(serving, request, raw_request)
        model, body = request.model, await raw_request.json()
        apr = _requested_options(body, request, chat)
        if apr is None:
            return await original(serving, request, raw_request)
        return await handler(serving, request, raw_request, body, apr, model=model)


def _requested_options(body: Mapping[str, Any], request: Any, serving: Any) -> Any:
    """Return the options of the trajectory that a request asks for, or None if it asks for none.

    A request asks by its field `apr`, or by the name of its model, from which the alias is removed.
    """
    apr, model = body.get("apr"), request.model
    is_alias = model is not None and has_alias(model, serving.tokenizer_manager.served_model_name)
    if is_alias:
        request.model = model.removesuffix(ALIAS_SUFFIX)
    if apr is False:
        return None
    return {} if apr is None and is_alias else apr
