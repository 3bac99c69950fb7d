"""Encodes text that quotes what a model wrote, which may repeat what strangers wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sgl_apr.engine.spelling_parts import merged_ranges
from sgl_apr.engine.untrusted_text import UntrustedText
from sgl_apr.tokenizer import Tokenizer, added_token_scanner, plain_ids


def encode_quoted(
    tokenizer: Tokenizer, text: str, quoted: Sequence[str], *, add_special_tokens: bool = False
) -> list[int]:
    """Encode a text with tags of its own. What it quotes may be a stranger's, and has no added tokens.

    Args:
        tokenizer: The tokenizer of the model.
        text: The text.
        quoted: What it quotes, wherever that occurs in it.
        add_special_tokens: As of `tokenizer.encode`.
    """
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    ranges = [
        (match.start(), match.end())
        for part in dict.fromkeys(quoted)
        if part and next(added_token_scanner(tokenizer).occurrences(part), None)
        for match in re.finditer(re.escape(part), text)
    ]
    if not ranges:
        return ids
    plain = UntrustedText(tokenizer).encode_marked(text, list(merged_ranges(ranges)))
    if add_special_tokens:  # those around the text
        own = tokenizer.encode(text)
        for start in range(len(ids) - len(own) + 1):
            if ids[start : start + len(own)] == own:
                return [*ids[:start], *plain, *ids[start + len(own) :]]
    return plain


def truncate_plain(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """`text`, or its first `max_tokens` tokens, where no spelling of an added token in it is one."""
    ids = plain_ids(tokenizer, text)
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens])
