"""The text that a model reads as the result of a call, within its limit of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sgl_apr.tokenizer import Tokenizer, plain_ids
from sgl_apr.trajectory.tool_calls import ToolOutcome

CHARS_PER_TOKEN = 8  # the first guess of how much of a long text is needed to fill its limit
MAX_ERROR_CHARS = 1000
HALF_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\(?:u[0-9a-f]{0,3})?$")  # the beginning of an escape of JSON


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What became of a call, before it is cut to its limit.

    Attributes:
        outcome: How it ended.
        text: What the tool returned, or an error for the model.
        limit: The limit that acted, if one did.
    """

    outcome: ToolOutcome
    text: str
    limit: str = ""


@dataclass(frozen=True, slots=True)
class EncodedResult:
    """The result of a call as the model reads it.

    Attributes:
        text: Its text.
        token_ids: Its token ids, none of which is an added token.
        truncated: Whether it was longer.
    """

    text: str
    token_ids: tuple[int, ...]
    truncated: bool = False


def error_result(outcome: ToolOutcome, reason: str, limit: str = "") -> ToolResult:
    """A result that tells the model what went wrong."""
    shown = reason if len(reason) <= MAX_ERROR_CHARS else f"{reason[:MAX_ERROR_CHARS]}..."
    return ToolResult(outcome, f"error: {shown}", limit)


def result_text(value: Any) -> str:
    """Return the text of what a tool returned: text as it is, other values as JSON, and what JSON has not by `str`.

    Raises:
        Exception: The value cannot be written: bytes that are no UTF-8, or a `__str__` that fails.

    Examples:
        >>> result_text("two"), result_text({"n": 2}), result_text(None)
        ('two', '{"n":2}', 'null')
    """
    from pydantic_core import PydanticSerializationError, to_json

    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode()
    try:
        return to_json(value).decode()
    except PydanticSerializationError:
        return str(value)


def encode_result(
    tokenizer: Tokenizer, text: str, max_tokens: int, escape: Callable[[str], str] = str
) -> EncodedResult:
    """Encode a result as plain text: tags and the syntax of calls in it are no special tokens.

    Args:
        tokenizer: Of the model.
        text: The result.
        max_tokens: Tokens that it may have. A longer one ends with a note that it was cut.
        escape: Writes text as the form around the result holds it.
    """
    text = text.encode(errors="replace").decode()  # half a surrogate pair has no tokens
    size, text = len(text), escape(text)
    max_chars = max_tokens * CHARS_PER_TOKEN
    while True:
        head = text[:max_chars]
        ids = plain_ids(tokenizer, head)
        if len(ids) > max_tokens or len(head) == len(text):
            break
        max_chars *= 4
    if len(ids) <= max_tokens:
        return EncodedResult(text, tuple(ids))
    note = escape(f"\n[cut: the result has {size} characters]")
    note_ids = plain_ids(tokenizer, note)
    if len(note_ids) >= max_tokens:
        note, note_ids = "", []
    kept = ids[: max_tokens - len(note_ids)]
    shown = tokenizer.decode(kept)
    is_escaped = escape("\n") != "\n"
    while kept and (
        shown.endswith("\ufffd") or (is_escaped and HALF_ESCAPE.search(shown))
    ):  # half a character
        kept = kept[:-1]
        shown = tokenizer.decode(kept)
    return EncodedResult(shown + note, (*kept, *note_ids), truncated=True)
