"""Renders chat messages by the chat template of a tokenizer in this process, as SGLang's server does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sgl_apr.engine.base import ChatEngine, Engine
from sgl_apr.engine.untrusted_text import Messages, Tools, encode_untrusted
from sgl_apr.errors import AprError, UnsupportedEngine
from sgl_apr.tokenizer import Tokenizer

ApplyTemplate = Callable[..., Any]  # as `apply_chat_template` of a tokenizer of transformers


async def encode_by_template(
    tokenizer: Tokenizer,
    apply_template: ApplyTemplate | None,
    messages: Messages,
    tools: Tools | None,
    *,
    engine_name: str,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of messages, up to where the reply begins.

    Args:
        tokenizer: Encodes the text.
        apply_template: Renders messages. None if the model has no template.
        messages: The messages.
        tools: The tools in OpenAI's form.
        engine_name: What has no template, in the error message.
        template_options: Further variables of the template.

    Raises:
        UnsupportedEngine: There is no template.
        AprError: The template refuses the messages.
    """
    if apply_template is None:
        raise UnsupportedEngine(
            f"{engine_name} has no chat template, expected a prompt that is text or token ids"
        )
    options = {**(template_options or {}), "tokenize": False, "add_generation_prompt": True}

    async def render(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        given = options if tools is None else {**options, "tools": tools}
        try:
            return str(apply_template(messages, **given))
        except Exception as error:  # of the template, which is a program
            if tools and all("function" in tool for tool in tools):
                try:  # some templates expect tools without OpenAI's wrapper
                    return str(apply_template(messages, **{**given, "tools": [t["function"] for t in tools]}))
                except Exception:
                    pass
            raise AprError(f"the chat messages cannot be rendered: {error}") from error

    return await encode_untrusted(tokenizer, messages, tools, render)


async def encode_messages(engine: Engine, messages: Messages, tools: Tools | None = None) -> Sequence[int]:
    """Return the token ids of messages by `encode_chat` of an engine, or by the template of its tokenizer.

    Raises:
        UnsupportedEngine: It has neither.
        AprError: The template refuses the messages.
    """
    if isinstance(engine, ChatEngine):
        # Engines of programs may take messages alone.
        return await (engine.encode_chat(messages, tools) if tools else engine.encode_chat(messages))
    template = getattr(engine.tokenizer, "apply_chat_template", None)
    return await encode_by_template(
        engine.tokenizer, template, messages, tools, engine_name=type(engine).__name__
    )


def normalized_messages(messages: Messages, content_format: str) -> list[dict[str, Any]]:
    """Return messages as SGLang hands them to a template.

    No content is empty text, arguments of calls are objects, and content in parts is text for a template that does not
    take parts.

    Args:
        messages: The messages.
        content_format: "openai" if the template takes parts, else "string".
    """
    from sglang.srt.entrypoints.openai import serving_chat
    from sglang.srt.parser.jinja_template_utils import process_content_for_template_format

    normalized = []
    for message in copy.deepcopy([dict(message) for message in messages]):
        if message.get("content") is None:
            message["content"] = ""
        try:
            serving_chat.normalize_assistant_tool_call_arguments(message)
        except ValueError as error:
            raise AprError(f"the chat messages cannot be rendered: {error}") from error
        message = process_content_for_template_format(message, content_format, [], [], [], [])
        message["content"] = serving_chat.normalize_tool_content(message["role"], message["content"])
        normalized.append(message)
    return normalized


@lru_cache(maxsize=8)
def content_format(template: str) -> str:
    """Return "openai" if a template takes content in parts, else "string"."""
    from sglang.srt.parser.jinja_template_utils import detect_jinja_template_content_format

    return str(detect_jinja_template_content_format(template))
