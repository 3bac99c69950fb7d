"""Records of what the engine and the budget did during a trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sgl_apr.trajectory.spans import Path


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that could have been decoded, and its log-probability."""

    token_id: int
    logprob: float


TopLogprobs = tuple[TokenLogprob, ...]  # of one position, the most likely token first


@dataclass(frozen=True, slots=True)
class Call:
    """One engine request, as the engine reported it.

    Attributes:
        phase: What it decoded.
        path: The sequence that it belongs to.
        prompt_tokens: The tokens of its prompt.
        cached_tokens: How many of them came from the engine's cache, without what a continuation computed again; None
            if the request was cut or failed before the engine reported it.
        new_tokens: How many of them no earlier call of this trajectory had computed.
        output_tokens: The tokens that it decoded.
        started: When it started, in seconds since the trajectory began.
        ended: When it ended, in seconds since the trajectory began.
        seed: The seed of its sampling (see `Trajectory.seeds_honoured`).
        retries: How often it was repeated after an error.
        continuations: How many further requests continued it where its token limit was extended. All of them count
            as one call here.
        logprobs: The log-probabilities of all output tokens, an end of text included, under the grammar's mask
            and the temperature; None if they were not requested.
        weight_version: The engine's name of the weights that it used.
        top_logprobs: For each output token the most likely tokens in its place; None if they were not requested.
    """

    phase: str
    path: Path
    prompt_tokens: int
    cached_tokens: int | None
    new_tokens: int
    output_tokens: int
    started: float
    ended: float
    seed: int | None = None
    retries: int = 0
    continuations: int = 0
    logprobs: tuple[float, ...] | None = None
    weight_version: str | None = None
    top_logprobs: tuple[TopLogprobs, ...] | None = None

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that earlier calls of the trajectory had already computed or decoded."""
        return self.prompt_tokens - self.new_tokens

    @property
    def reprefilled_tokens(self) -> int:
        """Shared tokens that were computed again because the cache did not hold them; 0 if that is unknown."""
        return 0 if self.cached_tokens is None else max(0, self.shared_tokens - self.cached_tokens)


@dataclass(frozen=True, slots=True)
class LimitHit:
    """A limit that cut a sequence or prevented it from forking.

    Attributes:
        limit: A field of the budget, "context" (that of the engine), or "policy".
        path: The sequence.
    """

    limit: str
    path: Path


@dataclass(frozen=True, slots=True)
class PacingDecision:
    """How many branches of a block ran at once, and what was known when this was decided.

    Attributes:
        path: The block.
        branches: How many branches it has.
        parallelism: How many of them ran at once.
        running: Requests that the engine was running.
        waiting: Requests that were waiting at the engine.
        free_tokens: Tokens that were free in the engine's cache.
        step_s: Seconds of one decoding step with that many requests; None if none was measured yet.
        reason: Why.
    """

    path: Path
    branches: int
    parallelism: int
    running: int
    waiting: int
    free_tokens: int
    step_s: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class JoinRecord:
    """How a block was joined, if a KV join was requested.

    Attributes:
        path: The block. If it is the path of a sequence instead, the cache lost what that sequence had joined, and
            the sequence was read as text from there on.
        by: "kv" (its branches stay parallel in the cache) or "text" (they were read sequentially).
        why: Why it was joined as text.
    """

    path: Path
    by: Literal["kv", "text"]
    why: str = ""
