"""Add the tags of a dialect to a tokenizer and to a model, one special token each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgl_apr.errors import AprError


def validate_tags(tags: Sequence[str]) -> list[str]:
    """The tags as a list.

    Raises:
        AprError: If a tag is empty, repeated, or has white space around it.
    """
    if isinstance(tags, str):
        raise AprError(f"tags = {tags!r}, expected a sequence of strings")
    for tag in tags:
        if not tag or tag != tag.strip():
            raise AprError(f"tag {tag!r}, expected text without white space around it")
    if repeated := sorted({tag for tag in tags if list(tags).count(tag) > 1}):
        raise AprError(f"tags given more than once: {' '.join(repeated)}")
    return list(tags)


def add_to_tokenizer(tokenizer: Any, tags: Sequence[str]) -> None:
    """Make each tag one special token of a transformers tokenizer, never normalized, merged or split."""
    from transformers import AddedToken

    added = [AddedToken(tag, special=True, normalized=False) for tag in tags]
    tokenizer.add_tokens(added, special_tokens=True)


def tag_text(tag: str) -> str:
    """The text of a tag without its brackets, `<Thread>` -> `Thread`, `</Thread>` -> `/Thread`."""
    return tag.strip("<>[]|") or tag


def add_to_model(model: Any, tokenizer: Any, tags: Sequence[str]) -> None:
    """Add tags to a model and to its tokenizer.

    The embedding of a new tag is the mean of the embeddings of the pieces of its text. A closing tag also has the piece of its
    slash, so that it differs from the opening tag. Input and output embeddings are treated alike. Tags that were in the
    vocabulary, and all other tokens, keep their embeddings.
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
