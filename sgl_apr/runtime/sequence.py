"""The state of one sequence while it grows: the trunk, or a branch."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from sgl_apr.runtime.allocation import Allowance
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.trajectory.join_layout import Layout, extend_layout
from sgl_apr.trajectory.spans import Path


@dataclass
class SequenceState:
    """One line of thought as it grows: the trunk, or a branch.

    `order` lists its spans as they stand in the text; `tip` are those that its next span follows. `allowance`
    is what it may still spend, `spent` the tokens that it and its branches have. `number` is as its header
    has it; `requests` counts its own. `lenient`: where the engine fails it ends with a note instead of
    an error. `joined` is the layout of its context up to the end of the last join in the KV cache;
    `committed`: all of a branch that has ended is in the cache.
    """

    path: Path
    context: tuple[int, ...]
    frontier: tuple[int, ...]
    allowance: Allowance
    scope: CancelScope
    span_order: list[int] = field(default_factory=list)
    number: str = ""
    outline: str = ""
    waits_for: tuple[int, ...] = ()
    blocks: int = 0
    tokens_used: int = 0
    requests: int = 0
    tolerate_failure: bool = False
    ahead: PendingBranches | None = None
    kv_layout: Layout = ()
    committed: bool = False

    @property
    def depth(self) -> int:
        return len(self.path) // 2

    @property
    def name(self) -> str:
        """Its path for people: "1.2"."""
        return ".".join(map(str, self.path))

    @property
    def layout(self) -> Layout | None:
        """That of its context, None if it stands in a line."""
        return extend_layout(self.kv_layout, len(self.context))

    @property
    def waiting(self) -> int:
        """How many of its branches run while it goes on."""
        return len(self.ahead.running) if self.ahead else 0


@dataclass(frozen=True, slots=True)
class PendingBranch:
    """A branch that runs while its sequence goes on, and what was set aside for it: `tokens` in all, of them
    `chain` behind its end in the critical path, which it reaches at `end` at most. A result has at most
    `most` tokens."""

    branch: SequenceState
    task: asyncio.Task[None]
    tokens: int
    closing_tokens: int
    end: int
    max_result_tokens: int


@dataclass
class PendingBranches:
    """Branches of a sequence that run while it goes on: `forked` are all of its open block, `running` those
    not joined, by their numbers."""

    forked: int = 0
    running: dict[str, PendingBranch] = field(default_factory=dict)
