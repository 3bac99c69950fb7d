"""A method asked a benchmark's problems, many at once, and each attempt measured as it ends; figures are made elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.engine.http import HttpEngine
from sgl_apr.engine.sequential import SequentialEngine
from sgl_apr.errors import (
    AprError,
    BudgetExceeded,
    CodeForbidden,
    GrammarError,
    KvJoinUnavailable,
    SandboxUnavailable,
    UnsupportedEngine,
)
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case
from sgl_apr.evaluation.cost_model import EngineCost
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults
from sgl_apr.evaluation.store import ResultStore
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.registry import method as named
from sgl_apr.methods.session import gather
from sgl_apr.methods.task import Inapplicable, Task

# What keeps a method from being asked at all.
NOT_APPLICABLE_ERRORS = (
    Inapplicable, BudgetExceeded, GrammarError, CodeForbidden, SandboxUnavailable, UnsupportedEngine, KvJoinUnavailable,
)  # fmt: skip
TIMEOUT_S = 600.0


async def evaluate(
    url: str, benchmark: Benchmark, method: str, store: ResultStore, **options: Any
) -> MethodResults:
    """What a server makes of the problems that are not among the attempts of this method yet, and of the others.

    Options are those of `attempted`. Raises `AprError` for attempts at other problems.
    """
    names = {number: case.name for number, case in enumerate(benchmark.cases)}
    done = store.attempts.get(method, {})
    if wrong := [attempt.problem for number, attempt in done.items() if names.get(number) != attempt.problem]:
        raise AprError(f"{method} was asked {wrong[0]!r}, which {benchmark.name} has not, or elsewhere")
    if len(done) == len(names):
        return store.results_of(method)
    async with await HttpEngine.connect(url, timeout=TIMEOUT_S) as engine:
        return await run_attempts(engine, benchmark, method, store, **options)


async def run_attempts(
    engine: Engine,
    benchmark: Benchmark,
    method: str,
    store: ResultStore,
    *,
    implementation: str | None = None,
    at_once: int = 512,
    cost: EngineCost | None = None,
    on_attempt: Callable[[], None] = lambda: None,
    **options: Any,
) -> MethodResults:
    """Attempts at all problems that `found` has none of yet, under the name of a method; `by`: which, if another.

    Options are those of the method. One that cannot be asked has a row that says why.
    """
    done = store.attempts.get(method, {})
    left = [(number, case) for number, case in enumerate(benchmark.cases) if number not in done]
    began = time.monotonic() - store.seconds.get(method, 0.0)
    gate, solve = asyncio.Semaphore(at_once), named(implementation or method)

    async def one(number: int, case: Case) -> None:
        async with gate:
            result = await solve(engine, case.problem, task=task, pacing=None, **options)
        # In a thread: a judge may think for seconds, and replies go on meanwhile.
        measured = await asyncio.to_thread(measure_attempt, benchmark, task, case, result, cost)
        store.add(method, number, measured, time.monotonic() - began, result.answer, result.trajectory)
        on_attempt()

    try:
        task = benchmark.task(engine)
        await gather(one(number, case) for number, case in left)
    except NOT_APPLICABLE_ERRORS as error:
        return MethodResults(method, (), reason=str(error))
    return store.results_of(method)


def measure_attempt(
    benchmark: Benchmark,
    task: Task[Any, Any],
    case: Case,
    result: MethodResult,
    cost: EngineCost | None = None,
) -> AttemptMetrics:
    """What one attempt came to."""

    def read(text: str) -> Hashable | None:
        return task.vote_key(answer) if (answer := task.answer(text)) else None

    return AttemptMetrics.from_result(case, result, benchmark.is_correct(case, result.answer), read, cost)


async def time_alone(
    url: str, benchmark: Benchmark, count: int, by: str, **options: Any
) -> tuple[float, float]:
    """Seconds for the first problems one after another: with all that a method asks at once, and one request at a time."""
    seconds = list[float]()
    async with await HttpEngine.connect(url, timeout=TIMEOUT_S) as engine:
        for asked in (engine, SequentialEngine(engine)):
            task, began = benchmark.task(asked), time.monotonic()
            for case in benchmark.cases[:count]:
                await named(by)(asked, case.problem, task=task, pacing=None, **options)
            seconds.append(time.monotonic() - began)
    return seconds[0], seconds[1]
