"""The chat template of the served model, as requests of OpenAI's API use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NO_CHAT_TEMPLATE = (
    "the model has no chat template, so the server cannot make a prompt of messages: send text to /v1/completions, or "
    "start the server with --chat-template"
)


def validate_chat_request(original: Any, serving: Any, request: Any) -> str | None:
    """Return what is wrong with a chat request, as SGLang does, or that the model has no chat template."""
    error: str | None = original(serving, request)
    return error or (None if _has_chat_template(serving, request) else NO_CHAT_TEMPLATE)


def _has_chat_template(serving: Any, request: Any) -> bool:
    """Return whether SGLang can make a prompt of the messages of a request."""
    templates = serving.template_manager
    return bool(
        request.input_ids is not None
        or templates.chat_template_name
        or templates.python_chat_template
        or serving.chat_encoding_spec
        or getattr(serving.tokenizer_manager.tokenizer, "chat_template", None)
        or (serving.default_chat_template_kwargs | (request.chat_template_kwargs or {})).get("chat_template")
    )


def branch_prompt_template(serving: Any, request: Any) -> Callable[[str], str] | None:
    """Return a function that applies the chat template to the message of a branch, if the model has one."""
    tokenizer = serving.tokenizer_manager.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return None
    template_options = {
        **serving.default_chat_template_kwargs,
        **(request.chat_template_kwargs or {}),
        "add_generation_prompt": True,
        "tokenize": False,
    }

    def apply_template(message: str) -> str:
        conversation = [{"role": "user", "content": message}]
        text = str(tokenizer.apply_chat_template(**{**template_options, "conversation": conversation}))
        # Encoding adds the BOS token once more if this tokenizer does that by itself.
        return text.removeprefix(tokenizer.bos_token or "") if serving._tokenizer_auto_adds_specials else text

    return apply_template
