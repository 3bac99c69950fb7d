"""What the loop asks of an engine: decode, commit, fork, abort, load; no dialect, no text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from sgl_apr.lowering import Backend
from sgl_apr.tokenizer import Tokenizer

TokenSink = Callable[[Sequence[int]], None]  # gets the ids of each chunk as it arrives


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `rid` begins with the trajectory's own prefix, so that one abort reaches all of them.

    `grammar` is text for the engine's grammar backend or None; `stop_ids` and `stop` end decoding and stay in the output. Where a
    grammar ends at a `stop` by itself an engine may ignore it: a stop string can cut inside a token.
    `sampling` holds further SGLang sampling parameters under SGLang's names.
    """

    rid: str
    input_ids: tuple[int, ...]
    max_tokens: int
    sampling: Mapping[str, Any] = field(default_factory=dict)
    grammar: str | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What came back: the ids as sampled (a final stop token included) and the engine's own counts."""

    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is, in requests and KV tokens."""

    running: int
    waiting: int
    used_tokens: int
    max_tokens: int


class Engine(Protocol):
    """An engine, or a forked part of one: each branch decodes through the engine that its fork returned.

    Every method raises an `EngineError` if the engine fails, and `EngineTimeout` if it does not
    answer in time. Cancelling a call aborts its request on the engine.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the served model."""
        ...

    @property
    def grammar_backend(self) -> Backend:
        """What turns grammars into masks there."""
        ...

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        """Decode one request, passing on ids as they arrive."""
        ...

    async def commit(self, rid: str, prefix: Sequence[int]) -> Result:
        """Prefill `prefix` and leave it in the cache; nothing is decoded."""
        ...

    async def fork(self, rid: str, prefix: Sequence[int], size: int) -> tuple[Result, Sequence[Engine]]:
        """Commit `prefix` once and return one engine per branch."""
        ...

    async def release(self) -> None:
        """Give back what `fork` took for this branch."""
        ...

    async def abort(self, rid: str) -> None:
        """Abort every request whose id begins with `rid`; never raises."""
        ...

    async def load(self) -> Load:
        """How busy the engine is."""
        ...
