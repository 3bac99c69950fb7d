"""Caches the texts of token ids that stand with log-probabilities, which SGLang decodes one by one in its event loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from sgl_apr.server.hooks import hook_around

_texts: weakref.WeakKeyDictionary[Any, dict[int, str]] = weakref.WeakKeyDictionary()  # by tokenizer manager


def register_hooks() -> None:
    """Look texts up where SGLang decodes them. `detokenize_top_logprobs_tokens` calls the same function."""
    hook_around(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager.detokenize_logprob_tokens",
        ["token_logprobs_val", "token_logprobs_idx", "decode_to_text"],
        detokenize_cached,
    )


def detokenize_cached(
    original: Callable[..., Any],
    manager: Any,
    token_logprobs_val: Sequence[float],
    token_logprobs_idx: Sequence[int],
    decode_to_text: bool,
) -> Any:
    """Return what SGLang's `detokenize_logprob_tokens` returns, and decode each id once in the server's life.

    Args:
        original: The method.
        manager: SGLang's tokenizer manager.
        token_logprobs_val: Log-probabilities.
        token_logprobs_idx: The token ids.
        decode_to_text: Whether to add the texts of the ids. Without them, None takes their place.
    """
    if not decode_to_text or manager.tokenizer is None:
        return original(manager, token_logprobs_val, token_logprobs_idx, decode_to_text)
    texts = _texts.setdefault(manager, {})
    try:
        return list(zip(token_logprobs_val, token_logprobs_idx, map(texts.__getitem__, token_logprobs_idx)))  # noqa: B905
    except (KeyError, TypeError):  # an id is new, or has another type
        pass
    size = len(manager.tokenizer)
    if not all(isinstance(token, int) and 0 <= token < size for token in token_logprobs_idx):
        return original(manager, token_logprobs_val, token_logprobs_idx, decode_to_text)
    missing = list(set(token_logprobs_idx).difference(texts))
    decoded = manager.tokenizer.batch_decode([[token] for token in missing])
    texts.update(zip(missing, decoded, strict=True))
    return list(zip(token_logprobs_val, token_logprobs_idx, map(texts.__getitem__, token_logprobs_idx)))  # noqa: B905
