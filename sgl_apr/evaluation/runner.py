"""Run a method on the problems of a benchmark, many at once, and measure each attempt."""

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
    MissingExtra,
    SandboxUnavailable,
    UnsupportedEngine,
)
from sgl_apr.evaluation.benchmarks.base import Benchmark, Case, CaseKey
from sgl_apr.evaluation.cost_model import EngineCost
from sgl_apr.evaluation.metrics import AttemptMetrics, MethodResults
from sgl_apr.evaluation.store import ResultStore
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.registry import method as find_method
from sgl_apr.methods.task import Inapplicable, Task
from sgl_apr.runtime.branch_group import gather

# Errors that mean that a method cannot run on this model or server at all.
NOT_APPLICABLE_ERRORS = (
    Inapplicable, BudgetExceeded, GrammarError, CodeForbidden, SandboxUnavailable, UnsupportedEngine, KvJoinUnavailable,
    MissingExtra,
)  # fmt: skip
TIMEOUT_S = 600.0


async def evaluate(
    url: str,
    benchmark: Benchmark,
    method: str,
    store: ResultStore,
    *,
    api_key: str | None = None,
    **options: Any,
) -> MethodResults:
    """Evaluate a method on a running server.

    Problems that `store` already has an attempt at are not repeated.

    Args:
        url: The server.
        benchmark: The problems.
        method: Name of the method.
        store: Where attempts are kept.
        api_key: Key of the server.
        **options: Those of `run_attempts`.

    Returns:
        The attempts at the problems of `benchmark`, those made before included; without attempts and with a reason if
        the method cannot run there.

    Raises:
        AprError: If `store` has attempts at other problems.
    """
    cases = benchmark.keyed_cases
    done = {key: attempt for key, attempt in store.attempts.get(method, {}).items() if key in cases}
    if wrong := [attempt.problem for key, attempt in done.items() if cases[key].name != attempt.problem]:
        raise AprError(
            f"{method} has an attempt at {wrong[0]!r}, which is not that problem of {benchmark.name}"
        )
    if len(done) == len(cases):
        return store.results_of(method, [*cases])
    async with await HttpEngine.connect(url, api_key=api_key, timeout=TIMEOUT_S) as engine:
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
    """Attempt every problem that `store` has no attempt at.

    Args:
        engine: Where the method decodes.
        benchmark: The problems.
        method: The name under which attempts are stored.
        store: Where attempts are kept.
        implementation: Name of the method to run, if it is not `method`.
        at_once: Problems under way at the same time.
        cost: Cost of the engine, to predict speedups by.
        on_attempt: Called after each attempt.
        **options: Options of the method.

    Returns:
        The attempts at the problems of `benchmark`, those made before included; without attempts and with a reason if
        the method cannot run here.

    Raises:
        Exception: What an attempt raised first. The attempts that have their answer by then are stored before.
    """
    done = store.attempts.get(method, {})
    cases = benchmark.keyed_cases
    remaining = [(key, case) for key, case in cases.items() if key not in done]
    began = time.monotonic() - store.seconds.get(method, 0.0)
    gate, solve = asyncio.Semaphore(at_once), find_method(implementation or method)
    storing = set[asyncio.Task[None]]()

    async def measure_and_store(key: CaseKey, case: Case, result: MethodResult) -> None:
        # In a thread: judging may take seconds, and must not hold up the other attempts.
        measured = await asyncio.to_thread(measure_attempt, benchmark, task, case, result, cost)
        seed, number = key
        seconds = time.monotonic() - began
        store.add(method, number, measured, seconds, result.answer, result.trajectory, seed=seed)
        on_attempt()

    async def attempt(key: CaseKey, case: Case) -> None:
        async with gate:
            result = await solve(engine, case.problem, task=task, pacing=None, **options)
        work = asyncio.create_task(measure_and_store(key, case, result))
        storing.add(work)
        del result
        await asyncio.shield(work)  # the failure of another attempt does not lose this one
        storing.discard(work)

    try:
        task = benchmark.task(engine)
        await gather(attempt(key, case) for key, case in remaining)
    except NOT_APPLICABLE_ERRORS as error:
        return MethodResults(method, (), reason=str(error))
    finally:
        await asyncio.gather(*storing, return_exceptions=True)
    return store.results_of(method, [*cases])


def measure_attempt(
    benchmark: Benchmark,
    task: Task[Any],
    case: Case,
    result: MethodResult,
    cost: EngineCost | None = None,
) -> AttemptMetrics:
    """Score one attempt and compute its metrics."""

    def answer_key(text: str) -> Hashable | None:
        return task.vote_key(answer) if (answer := task.answer(text)) else None

    correct = benchmark.is_correct(case, result.answer)
    return AttemptMetrics.from_result(case, result, correct, answer_key, cost)


async def time_alone(
    url: str, benchmark: Benchmark, count: int, method: str, *, api_key: str | None = None, **options: Any
) -> tuple[float, float]:
    """Time a method on the first problems of a benchmark, one problem after another.

    Args:
        url: The server.
        benchmark: The problems.
        count: How many of them.
        method: Name of the method.
        api_key: Key of the server.
        **options: Options of the method.

    Returns:
        Seconds in total with the method's own concurrency, and with one request at a time. They are the same, and measured once,
        where every reply is a single request.
    """
    seconds = list[float]()
    async with await HttpEngine.connect(url, api_key=api_key, timeout=TIMEOUT_S) as engine:
        for timed in (engine, SequentialEngine(engine)):
            task, calls, began = benchmark.task(timed), 0, time.monotonic()
            for case in benchmark.cases[:count]:
                result = await find_method(method)(timed, case.problem, task=task, pacing=None, **options)
                calls = max(calls, len(result.trajectory.calls))
            seconds.append(time.monotonic() - began)
            if calls <= 1:
                break
    return seconds[0], seconds[-1]
