"""How many branches of a fork run at once, given the load of the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from sgl_apr.engine.base import Engine, Load
from sgl_apr.errors import AprError
from sgl_apr.runtime.value_checks import check_numbers, shorten


@dataclass(frozen=True, slots=True)
class Demand:
    """A fork that is about to run: how many branches, and how many tokens each may write."""

    branches: int
    tokens: int


# Returns how many branches run at once, and why.
PacingFunction = Callable[[Demand, Load], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Pacing:
    """Runs all branches at once, unless fewer at a time end sooner or not all fit into memory.

    n branches, k at a time, take n/k rounds (rounded up) of decoding steps with k more requests than run now. Step
    times are those that this client has measured (`Load.step_s`). Without a measurement all branches run at once.

    Attributes:
        min_speedup: Fewer branches run at once only if that ends so many times sooner.
        expected_fill: The share of its tokens that a branch is expected to write. No more branches run at once than
            fit into the free KV tokens. SGLang's scheduler expects 0.7 at first, and less as it continues.
        max_parallel: How many run at once, at most.
    """

    min_speedup: float = 1.1
    expected_fill: float = 0.3
    max_parallel: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "pacing")
        if (
            self.min_speedup < 1
            or not 0 < self.expected_fill <= 1
            or (self.max_parallel is not None and self.max_parallel < 1)
        ):
            raise AprError(f"{self}: expected min_speedup >= 1, 0 < expected_fill <= 1, max_parallel >= 1")

    def __call__(self, demand: Demand, load: Load) -> tuple[int, str]:
        n = demand.branches
        choices = [(n, "all at once"), self._by_speed(n, load), self._by_memory(demand, load)]
        if self.max_parallel is not None:
            choices.append((min(n, self.max_parallel), f"at most {self.max_parallel}"))
        return min(choices, key=lambda choice: choice[0])

    def _by_speed(self, n: int, load: Load) -> tuple[int, str]:
        def seconds(k: int) -> float:
            return -(-n // k) * (load.step_s(load.running + k) or 0.0)

        best = min(range(n, 0, -1), key=seconds)  # on a tie, the most at once
        sooner = seconds(n) >= self.min_speedup * seconds(best) > 0
        return (best, f"{best} at a time end {seconds(n) / seconds(best):.2f}x sooner") if sooner else (n, "")

    def _by_memory(self, demand: Demand, load: Load) -> tuple[int, str]:
        fit = int(load.free_tokens // max(1.0, self.expected_fill * demand.tokens))
        return max(1, min(demand.branches, fit)), f"{load.free_tokens} KV tokens are free"


async def affordable_width(
    engine: Engine,
    width: int,
    tokens: int,
    *,
    max_slowdown: float = 2.0,
    pacing: PacingFunction | None = None,
) -> int:
    """How wide a fork may be, given the load of the engine, so that it does not slow down all requests much.

    Put the number into the prompt of a model that follows stated widths, so that it forks narrower on a busy server. Pacing cannot do
    that: the branches of a fork that is written have to run, at once or not. The option `cap_width_by_load` is for other models: it ends a fork at the width at which all branches run at once.

    Args:
        engine: The engine that will run the prompt.
        width: The widest fork.
        tokens: Tokens that a branch may write.
        max_slowdown: A decoding step with the branches takes at most so many times as long as one with a single request, as far
            as this client has measured it (`Load.step_s`).
        pacing: Limits how many branches run at once; `Pacing()` by default.

    Returns:
        A number from 1 to `width`.

    Raises:
        AprError: `max_slowdown` is below 1, or the engine does not report its load, or as `choose_parallelism`.
    """
    if max_slowdown < 1:
        raise AprError(f"max_slowdown={max_slowdown}, expected at least 1")
    load = await engine.load()
    parallelism, _ = choose_parallelism(pacing or Pacing(), Demand(width, tokens), load)
    longest = max_slowdown * (load.step_s(1) or 0.0)
    fast = (k for k in range(width, 1, -1) if (load.step_s(load.running + k) or 0.0) <= longest)
    return min(width, parallelism, next(fast, 1))


def choose_parallelism(pacing: PacingFunction, demand: Demand, load: Load) -> tuple[int, str]:
    """Return how many branches run at once, and why.

    Raises:
        AprError: The function raised something else than an `AprError`, or did not return a number from 1 and a reason.
    """
    expected = 'expected how many branches run at once, from 1, and why, such as (2, "two at a time")'
    try:
        decision: Any = pacing(demand, load)
    except AprError:
        raise
    except Exception as error:
        raise AprError(f"the pacing function raised {shorten(error)}, {expected}") from error
    if isinstance(decision, tuple) and len(decision) == 2:
        branches, reason = decision
        is_count = isinstance(branches, Integral) and not isinstance(branches, bool) and int(branches) >= 1
        if is_count and isinstance(reason, str):
            return int(branches), reason
    raise AprError(f"the pacing function returned {shorten(decision)}, {expected}")
