"""Records of what the engine and the budget did during a trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sgl_apr.trajectory.spans import Path

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Call:
    """One engine request as the engine reported it. Times are seconds since the trajectory began.

    `new_tokens` is how much of the prompt no earlier call of this trajectory had computed, so
    `prompt_tokens - new_tokens` is the prefix it shares with them; `cached_tokens` is None where the request
    was cut or failed before the engine said it. `seed` is that of its sampling (see `Trajectory.seeds_honoured`),
    `retries` how often it was repeated after an error. `logprobs` are those of all output tokens, an end of
    text included, under the grammar's mask and the temperature, where they were asked for; `weights` is what
    the engine calls the weights that it used.
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
    logprobs: tuple[float, ...] | None = None
    weight_version: str | None = None

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that earlier calls of the trajectory had already computed or decoded."""
        return self.prompt_tokens - self.new_tokens

    @property
    def reprefilled(self) -> int:
        """Shared tokens that were computed once more because the cache did not hold them, as far as known."""
        return 0 if self.cached_tokens is None else max(0, self.shared_tokens - self.cached_tokens)


@dataclass(frozen=True, slots=True)
class LimitHit:
    """A field of the budget, "context" (the engine's), or "policy", that acted: it cut the sequence at `path`, or took forks from it."""

    limit: str
    path: Path


@dataclass(frozen=True, slots=True)
class PacingDecision:
    """How many of the branches of block `path` were run at once, and what was known when it was decided.

    Counts are the engine's when it was asked; `step_s` are the seconds of one decoding step measured at
    so many requests, None where none was measured yet.
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
    """How a block was joined, where more than one way was asked for: by "kv" (its branches side by side in
    the cache) or by "text" (all read in a line), and why not otherwise.

    With the path of a sequence in place of a block's: the cache lost what that sequence had joined, and it read
    all of it in a line from there on.
    """

    path: Path
    by: Literal["kv", "text"]
    why: str = ""


def with_path_tuple(data: Mapping[str, Any]) -> dict[str, Any]:
    return {**data, "path": tuple(data["path"])}


def call_from_json(data: Mapping[str, Any]) -> Call:
    logprobs = data["logprobs"]
    return Call(
        **{**with_path_tuple(data), "logprobs": None if logprobs is None else tuple(map(float, logprobs))}
    )
