"""Keeps messages of chat requests without `apr` from having control tokens, if the operator wants that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgl_apr.engine.untrusted_text import Rendered, UntrustedText, render_untrusted
from sgl_apr.server.api.chat.prompt import marked_messages
from sgl_apr.tokenizer import load_tokenizer


def apply_jinja_template(
    original: Callable[..., Any], serving: Any, request: Any, tools: Any, is_multimodal: bool
) -> Any:
    """Apply a chat template of Jinja as SGLang does. What users, tools and clients wrote becomes no added token."""

    def apply(untrusted: UntrustedText) -> Any:
        return original(serving, request, untrusted.mark(tools), is_multimodal)

    return _apply_marked(serving, request, is_multimodal, apply)


def apply_conversation_template(
    original: Callable[..., Any], serving: Any, request: Any, is_multimodal: bool
) -> Any:
    """Do the same with one of SGLang's own templates."""
    return _apply_marked(
        serving, request, is_multimodal, lambda untrusted: original(serving, request, is_multimodal)
    )


def _apply_marked(
    serving: Any, request: Any, is_multimodal: bool, apply: Callable[[UntrustedText], Any]
) -> Any:
    tokenizer = load_tokenizer(str(serving.tokenizer_manager.config_value("tokenizer_path")))
    processed: Any = None

    def render(untrusted: UntrustedText) -> Rendered:
        nonlocal processed
        with marked_messages(request, untrusted):
            processed = apply(untrusted)
        rendered: Rendered = processed.prompt if is_multimodal else processed.prompt_ids
        return rendered

    ids, _ = render_untrusted(tokenizer, render)
    if ids is not None:
        processed.prompt_ids = ids
    return processed
