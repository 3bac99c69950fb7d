"""What the loop asks of an engine: decode, commit, fork, abort, load; no dialect, no text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

from sgl_apr.formats.masks.writer import GrammarBackend
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.join_layout import Layout

TokenSink = Callable[[Sequence[int]], None]  # gets the ids of each chunk as it arrives


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `rid` begins with the trajectory's own prefix, so that one abort reaches all of them.

    `grammar` is text for the engine's grammar backend or None; `stop_ids` and `stop` end decoding and stay in the output. Where a
    grammar ends at a `stop` by itself an engine may ignore it: a stop string can cut inside a token.
    `sampling` holds further SGLang sampling parameters, and `fields` further fields of the request (lora_path,
    cache_salt, ...), under SGLang's names. `layout` says which of the ids were written side by side, None
    that they stand in a line; an engine that does not join in its cache (`joins_kv`) is sent none. `logprobs`
    asks for the log-probabilities of what is decoded.
    """

    rid: str
    input_ids: tuple[int, ...]
    max_tokens: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    grammar: str | None = None
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    layout: Layout | None = None
    logprobs: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What came back: the ids as sampled (a final stop token included) and the engine's own counts.

    `cached_tokens` is None of a request that was cut before the engine said it. `logprobs` are those of
    `token_ids`, if they were asked for; `weights` is what the engine calls the weights that it used.
    """

    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int | None
    logprobs: tuple[float, ...] | None = None
    weight_version: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is, in requests and KV tokens.

    used_tokens: those that running requests hold. Cached ones that no request uses are not among them.
    slots: how many requests run at once at most, if the engine says.
    steps: (requests running, seconds of a decoding step), ascending, as measured by this client: it counts
        its own requests only.
    """

    running: int
    waiting: int
    used_tokens: int
    max_tokens: int
    max_running_requests: int | None = None
    steps: tuple[tuple[float, float], ...] = ()

    @property
    def free_tokens(self) -> int:
        """KV tokens that another request could get, if need be by evicting what is only cached. What waits
        comes before it, and what runs will still grow: neither is taken off."""
        return max(0, self.max_tokens - self.used_tokens)

    def step_s(self, running: int) -> float | None:
        """Seconds of a decoding step with so many requests running, or None if too little was measured.

        On the line between the two measured next to it; below the lowest as there; above the highest on
        along the last line, if that rises, but at most in proportion to the requests.
        """
        if not self.steps or (len(self.steps) == 1 and running > 2 * self.steps[0][0]):
            return None
        (lowest, seconds), slope = self.steps[0], 0.0
        if running <= lowest:
            return seconds
        for (low, before), (high, after) in pairwise(self.steps):
            slope = (after - before) / (high - low)
            if running <= high:
                return before + slope * (running - low)
        highest, seconds = self.steps[-1]
        return seconds + min(max(slope, 0.0), seconds / highest) * (running - highest)


class Engine(Protocol):
    """An engine, or a forked part of one: each branch decodes through the engine that its fork returned.

    Every method raises an `EngineError` if the engine fails, and `EngineTimeout` if it does not
    answer in time; its status is 409 where the cache has lost what a layout needs. Cancelling a call aborts
    its request on the engine.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the served model."""
        ...

    @property
    def grammar_backend(self) -> GrammarBackend:
        """What turns grammars into masks there."""
        ...

    @property
    def supports_seeds(self) -> bool:
        """Whether `sampling_seed` among the sampling parameters makes sampling repeatable."""
        ...

    @property
    def context(self) -> int | None:
        """How many tokens a prompt and what is decoded behind it may have together, if the engine says."""
        ...

    @property
    def joins_kv(self) -> bool:
        """Whether requests may have a layout: branches join in the KV cache."""
        ...

    async def decode(self, request: Request, on_tokens: TokenSink | None = None) -> Result:
        """Decode one request, passing on ids as they arrive."""
        ...

    async def commit(self, request: Request) -> Result:
        """Prefill the request's ids and leave them in the cache; nothing is decoded."""
        ...

    async def fork(self, request: Request, size: int) -> tuple[Result, Sequence[Engine]]:
        """Commit the request's ids once and return one engine per branch."""
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
