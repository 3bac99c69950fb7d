"""Collects the log-probabilities that an SGLang server sends with the chunks of a request."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, TypeVar

from sgl_apr.engine.base import LogprobSink, Request
from sgl_apr.engine.unexpected_answer import unexpected
from sgl_apr.trajectory.calls import TokenLogprob, TopLogprobs

T = TypeVar("T")


class CollectedLogprobs:
    """The log-probabilities of one request so far.

    Args:
        name: The engine, for messages.
        on_top: Receives the most likely tokens of each chunk.

    Attributes:
        values: Those of the decoded tokens, empty if none were requested.
        top: The most likely tokens in the place of each, empty if none were requested.
    """

    def __init__(self, name: str, on_top: LogprobSink | None = None) -> None:
        self._name, self._on_top = name, on_top
        self.values: list[float] = []
        self.top: list[TopLogprobs] = []

    def add(self, meta: Mapping[str, Any]) -> None:
        """Add those of a chunk, by its `meta_info`.

        Raises:
            EngineError: One of them is no log-probability.
        """
        self.values += new_logprobs(self._name, len(self.values), meta)
        new = new_top_logprobs(self._name, len(self.top), meta)
        self.top += new
        if new and self._on_top:
            self._on_top(new)


def new_entries(entries: list[T], known: int, meta: Mapping[str, Any]) -> list[T]:
    """Return what is new in a list that a chunk has for its tokens: of all tokens so far, or only of the new ones.

    Args:
        entries: The list.
        known: How many entries earlier chunks had.
        meta: `meta_info` of the chunk, which counts the tokens so far.
    """
    count = meta["completion_tokens"]
    return entries[known:count] if len(entries) >= count else entries


def logprob_fields(request: Request) -> dict[str, Any]:
    """Return the fields of SGLang's request that ask for the log-probabilities of a request."""
    fields: dict[str, Any] = {"return_logprob": True} if request.logprobs else {}
    return fields | ({"top_logprobs_num": request.top_logprobs} if request.top_logprobs else {})


def new_logprobs(name: str, known: int, meta: Mapping[str, Any]) -> list[float]:
    """Return the log-probabilities that are new in a chunk, empty if none were requested.

    Args:
        name: The engine, for messages.
        known: How many log-probabilities earlier chunks had.
        meta: `meta_info` of the chunk.

    Raises:
        EngineError: One of them is no number.
    """
    logprobs = meta.get("output_token_logprobs") or []
    if not isinstance(logprobs, list):
        raise unexpected(name, "output_token_logprobs", type(logprobs).__name__, "a list")
    values: list[float] = []
    for entry in new_entries(logprobs, known, meta):
        value = entry[0] if isinstance(entry, (list, tuple)) and entry else entry
        if type(value) not in (int, float) or not isfinite(value):
            raise unexpected(name, "a log-probability", repr(value)[:60], "a finite number")
        values.append(float(value))
    return values


def new_top_logprobs(name: str, known: int, meta: Mapping[str, Any]) -> list[TopLogprobs]:
    """Return the most likely tokens that are new in a chunk, empty if none were requested.

    Tokens that the grammar rules out are left out.

    Args:
        name: The engine, for messages.
        known: How many positions earlier chunks had.
        meta: `meta_info` of the chunk.

    Raises:
        EngineError: One of them is no token with a log-probability.
    """
    positions = meta.get("output_top_logprobs") or []
    if not isinstance(positions, list):
        raise unexpected(name, "output_top_logprobs", type(positions).__name__, "a list")
    new = new_entries(positions, known, meta)
    try:
        return [
            tuple(
                TokenLogprob(int(token), float(value))
                for value, token, *_ in position or ()
                if isfinite(value)
            )
            for position in new
        ]
    except (TypeError, ValueError):
        raise unexpected(
            name, "a position of output_top_logprobs", repr(new)[:60], "log-probabilities with token ids"
        ) from None
