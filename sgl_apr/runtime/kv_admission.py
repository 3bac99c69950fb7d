"""Starts trajectories while few enough run, and while what they need is expected to fit into the KV cache."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from sgl_apr.engine.base import Engine
from sgl_apr.errors import EngineError
from sgl_apr.trajectory.trajectory import Trajectory

POOL_SHARE = 0.9  # of the KV cache; SGLang also needs room for what it is about to decode
PRIOR_TOKENS = 512  # what a trajectory is expected to write, at most, until one has ended
AVERAGING_WINDOW = 64  # trajectories that a mean covers
LOAD_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Slot:
    """The place of one trajectory, which waits for its start or runs.

    Attributes:
        prompt_tokens: Tokens of its prompt.
        max_tokens: Tokens that it may write.
        started: Set when it may start.
        trajectory: The finished trajectory. Its owner sets it, so that the estimate learns from it.
    """

    prompt_tokens: int
    max_tokens: int
    started: asyncio.Event = field(default_factory=asyncio.Event)
    trajectory: Trajectory | None = None


class KvEstimate:
    """Estimates how many KV tokens a trajectory needs: the part of its prompt that was not cached, and what it writes.

    Both are means over the trajectories that have ended, mostly over the last ones. Before the first one has ended, the
    complete prompt counts, and all that the trajectory may write, up to `PRIOR_TOKENS`.

    Attributes:
        ended: How many trajectories have ended.
        uncached_share: The part of a prompt that was not cached.
        written_tokens: Tokens that a trajectory wrote.
    """

    def __init__(self) -> None:
        self.ended, self.uncached_share, self.written_tokens = 0, 1.0, float(PRIOR_TOKENS)

    def tokens(self, slot: Slot) -> float:
        """The KV tokens that a trajectory is expected to need at its end."""
        return slot.prompt_tokens * self.uncached_share + min(slot.max_tokens, self.written_tokens)

    def record(self, trajectory: Trajectory) -> None:
        """Learn from a trajectory that has ended."""
        first = trajectory.calls[0] if trajectory.calls else None
        if first is None or first.cached_tokens is None:  # nothing was sent, or it was cut at once
            return
        self.ended += 1
        weight = 1 / min(self.ended, AVERAGING_WINDOW)
        uncached = 1 - first.cached_tokens / max(1, first.prompt_tokens)
        written = sum(span.tokens for span in trajectory.spans if span.origin != "prompt")
        self.uncached_share += weight * (max(0.0, uncached) - self.uncached_share)
        self.written_tokens += weight * (written - self.written_tokens)


class KvAdmission:
    """Starts trajectories in the order of their arrival.

    The next one starts when fewer than `concurrency` run, and when it and those that run are expected to fit into
    `POOL_SHARE` of the KV cache. If none runs, it starts however large it is. A trajectory that runs never waits here
    again, so that no two can wait for each other.

    Args:
        concurrency: How many run at once at most.

    Attributes:
        pool_tokens: Size of the KV cache in tokens. If it is None, only `concurrency` counts.
        estimate: What a trajectory is expected to need.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.pool_tokens: int | None = None
        self.estimate = KvEstimate()
        self._running = dict[Slot, None]()
        self._waiting = deque[Slot]()

    @property
    def running(self) -> int:
        """How many run."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def must_wait(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a trajectory that arrives now has to wait."""
        return bool(self._waiting) or not self._fits(Slot(prompt_tokens, max_tokens))

    @asynccontextmanager
    async def slot(self, prompt_tokens: int, max_tokens: int) -> AsyncIterator[Slot]:
        """Wait until a trajectory may start, and count it as running for the duration of the block.

        Cancelling the call gives its place up.

        Args:
            prompt_tokens: Tokens of its prompt.
            max_tokens: Tokens that it may write.
        """
        slot = Slot(prompt_tokens, max_tokens)
        self._waiting.append(slot)
        self._start_waiting()
        try:
            await slot.started.wait()  # returns at once if it is set
            yield slot
        finally:
            if slot in self._running:
                del self._running[slot]
            else:
                self._waiting.remove(slot)
            if slot.trajectory is not None:
                self.estimate.record(slot.trajectory)
            self._start_waiting()

    def _start_waiting(self) -> None:
        while self._waiting and self._fits(self._waiting[0]):
            slot = self._waiting.popleft()
            self._running[slot] = None
            slot.started.set()

    def _fits(self, slot: Slot) -> bool:
        if not self._running:
            return True
        if len(self._running) >= self.concurrency:
            return False
        if self.pool_tokens is None:
            return True
        needed = sum(map(self.estimate.tokens, self._running), self.estimate.tokens(slot))
        return needed <= POOL_SHARE * self.pool_tokens


async def fetch_pool_tokens(engine: Engine) -> int | None:
    """Return the size of an engine's KV cache in tokens, or None if the engine does not report it in time."""
    try:
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            tokens = (await engine.load()).max_tokens
    except (EngineError, OSError) as error:  # also TimeoutError
        log.info("the size of the KV cache is not known: %r", error)
        return None
    return tokens if tokens > 0 else None
