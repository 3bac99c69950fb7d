"""How many branches of a fork run at once on the engine as it is now; it starts none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sgl_apr.engine.base import Load
from sgl_apr.errors import AprError


@dataclass(frozen=True, slots=True)
class Demand:
    """A fork that is about to run: its branches, and the tokens that each may write at the most."""

    branches: int
    tokens: int


# How many at once (1 to all of them), and why.
PacingFunction = Callable[[Demand, Load], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Pacing:
    """The default pace: all branches at once, unless fewer at a time end sooner or all do not fit.

    speed: n branches, k at a time, take n/k rounds (rounded up) of steps with k more requests than run
        now, by the step times that this client has measured (`Load.step_s`), under whatever load others put
        on the engine meanwhile. Fewer are run where that ends `gain` times sooner than all at once; where
        nothing was measured, all are.
    memory: no more than fit into the free KV tokens, if each writes `fill` of what it may (SGLang's own
        scheduler expects 0.7 at first, and less and less as it goes on).
    most: never more than so many.
    """

    min_speedup: float = 1.1
    expected_fill: float = 0.3
    max_parallel: int | None = None

    def __post_init__(self) -> None:
        if (
            self.min_speedup < 1
            or not 0 < self.expected_fill <= 1
            or (self.max_parallel is not None and self.max_parallel < 1)
        ):
            raise AprError(f"{self}: expected gain >= 1, 0 < fill <= 1, most >= 1")

    def __call__(self, demand: Demand, load: Load) -> tuple[int, str]:
        n = demand.branches
        ways = [(n, "all at once"), self._by_speed(n, load), self._by_memory(demand, load)]
        if self.max_parallel is not None:
            ways.append((min(n, self.max_parallel), f"at most {self.max_parallel}"))
        return min(ways, key=lambda way: way[0])

    def _by_speed(self, n: int, load: Load) -> tuple[int, str]:
        def seconds(k: int) -> float:
            return -(-n // k) * (load.step_s(load.running + k) or 0.0)

        best = min(range(n, 0, -1), key=seconds)  # of equals the one with the most at once
        sooner = seconds(n) >= self.min_speedup * seconds(best) > 0
        return (best, f"{best} at a time end {seconds(n) / seconds(best):.2f}x sooner") if sooner else (n, "")

    def _by_memory(self, demand: Demand, load: Load) -> tuple[int, str]:
        fit = int(load.free_tokens // max(1.0, self.expected_fill * demand.tokens))
        return max(1, min(demand.branches, fit)), f"{load.free_tokens} KV tokens are free"
