"""How busy an engine is, and how long its decoding steps take."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is, in requests and KV tokens.

    Attributes:
        running: Requests that are running.
        waiting: Requests that are queued.
        used_tokens: KV tokens that running requests hold. Cached tokens that no request uses are not counted.
        max_tokens: Size of the KV cache, in tokens.
        max_running_requests: How many requests run at once at most, if the engine reports it.
        steps: (requests running, seconds of a decoding step), ascending. This client measures them, on its own
            requests only.
    """

    running: int
    waiting: int
    used_tokens: int
    max_tokens: int
    max_running_requests: int | None = None
    steps: tuple[tuple[float, float], ...] = ()

    @property
    def free_tokens(self) -> int:
        """KV tokens that another request could get, if need be by evicting tokens that are only cached.

        Requests that wait come first, and running requests still grow. Neither is subtracted.
        """
        return max(0, self.max_tokens - self.used_tokens)

    def step_s(self, running: int) -> float | None:
        """Estimate the seconds of a decoding step with `running` requests.

        Linear interpolation between the two nearest measurements. Beyond them, the nearest line extended if it rises, but
        at most in proportion to the requests. A client of a busy server so knows about what a single request would take.

        Returns:
            Seconds, or None if too little was measured.
        """
        if not self.steps or (len(self.steps) == 1 and running > 2 * self.steps[0][0]):
            return None
        slope = 0.0
        if running <= self.steps[0][0]:
            return self._step_below(running)
        for (low, before), (high, after) in pairwise(self.steps):
            slope = (after - before) / (high - low)
            if running <= high:
                return before + slope * (running - low)
        highest, seconds = self.steps[-1]
        return seconds + min(max(slope, 0.0), seconds / highest) * (running - highest)

    def _step_below(self, running: int) -> float:
        """The same for no more requests than the lowest measurement has."""
        lowest, seconds = self.steps[0]
        if len(self.steps) == 1:
            return seconds
        next_lowest, longer = self.steps[1]
        slope = (longer - seconds) / (next_lowest - lowest)
        return seconds - min(max(slope, 0.0), seconds / lowest) * (lowest - running)
