"""Adds a dialect's tags to a tokenizer and a model, one special token each; it trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgl_apr.errors import AprError


def validate_tags(tags: Sequence[str]) -> list[str]:
    """The tags as a list, or an `AprError` where one is empty, repeated or padded with white space."""
    if isinstance(tags, str):
        raise AprError(f"tags must be a sequence of strings, not the string {tags!r}")
    for tag in tags:
        if not tag or tag != tag.strip():
            raise AprError(f"a tag must be text without white space around it, not {tag!r}")
    if repeated := sorted({tag for tag in tags if list(tags).count(tag) > 1}):
        raise AprError(f"these tags are given more than once: {' '.join(repeated)}")
    return list(tags)


def add_to_tokenizer(tokenizer: Any, tags: Sequence[str]) -> None:
    """Makes each tag one special token of a transformers tokenizer, never normalized, merged or split."""
    from transformers import AddedToken

    added = [AddedToken(tag, special=True, normalized=False) for tag in tags]
    tokenizer.add_tokens(added, special_tokens=True)


def tag_text(tag: str) -> str:
    """What a tag says, to start its embedding from: `<Thread>` -> `Thread`, `</Thread>` -> `/Thread`."""
    return tag.strip("<>[]|") or tag


def add_to_model(model: Any, tokenizer: Any, tags: Sequence[str]) -> None:
    """Adds the tags to both; a new row is the mean of the rows of the pieces of the tag's `words`.

    A closer has the piece of its slash besides, so that it differs from its opener. Input and output rows are
    set alike. A tag that was in the vocabulary keeps its row, and so does every other token.
    """
    import torch

    pieces = {tag: tokenizer.encode(tag_text(tag), add_special_tokens=False) for tag in tags}
    old = len(tokenizer)
    add_to_tokenizer(tokenizer, tags)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = [model.get_input_embeddings().weight]
    if not model.config.tie_word_embeddings:
        tables.append(model.get_output_embeddings().weight)
    with torch.no_grad():
        for tag, ids in pieces.items():
            row = tokenizer.convert_tokens_to_ids(tag)
            if row >= old:
                for table in tables:
                    table[row] = table[ids].mean(dim=0)
