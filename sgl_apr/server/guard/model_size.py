"""What the checks need to know of the model and of the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What the checks need to know of the model.

    Attributes:
        context_length: Tokens of the context.
        prompt_chars: Characters that fill the context with the longest tokens.
        vocab_size: Number of token ids.
        is_multimodal: Whether the model reads images, video or audio.
        allows_embeds: Whether prompts may be vectors.
        choices: The names that SGLang knows, by the field in which a request has one of them.
        request_fields: The fields of a request to the engine.
        load_sections: The names in the query of `/v1/loads`.
    """

    context_length: int
    prompt_chars: int
    vocab_size: int
    is_multimodal: bool = False
    allows_embeds: bool = False
    choices: Mapping[str, frozenset[str]] = field(default_factory=dict)
    request_fields: frozenset[str] = frozenset()
    load_sections: frozenset[str] = frozenset()
