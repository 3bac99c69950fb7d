"""Measure the cost of an engine with a few seconds of its own requests; other load on the engine distorts it."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

from sgl_apr.engine.base import Engine, Request
from sgl_apr.engine.http import HttpEngine
from sgl_apr.errors import AprError
from sgl_apr.evaluation.cost_model import EngineCost, seconds_per_token
from sgl_apr.trajectory.jsonl import file_error

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
SHORT_PROMPT, LONG_PROMPT = 16, 512  # prompt tokens
MIN_STEPS, MAX_STEPS = 4, 64  # decoding steps of one request
REPEATS, TARGET_S = 3, 0.2  # runs of each measurement (the median counts), and about how long one takes
SWEEP_LIMIT_S = 5.0  # after which no larger batch size is timed


class EngineTimer:
    """Times single requests for the cost of prompts, and batches with a short cached prompt for the cost of steps.

    Args:
        engine: What is timed.
        clock: Returns seconds. The clock of uvloop, which SGLang installs, counts whole milliseconds, and an engine with
            a small model takes less for a request.

    Raises:
        AprError: If the context of the engine is too short for that.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.perf_counter) -> None:
        self.engine, self.clock, self.random = engine, clock, random.Random()
        self.long = LONG_PROMPT if engine.context is None else min(LONG_PROMPT, engine.context - 1)
        if self.long < SHORT_PROMPT + MAX_STEPS:
            raise AprError(
                f"the engine has a context of {engine.context} tokens, expected more than {SHORT_PROMPT + MAX_STEPS}"
            )

    async def measure_cost(self) -> EngineCost:
        """Measure the cost; decoding steps of one and two requests at least, of more as time allows.

        No cost is 0, however noisy the measurements are. A difference of two measurements that is not positive is replaced
        by what the cost is at most.
        """
        prompt = self.unique_prompt(SHORT_PROMPT)
        await self.time_decoding(prompt, 1, MIN_STEPS)  # warm-up: the first request takes longer
        short = await self.median_seconds(lambda: self.time_prefill(SHORT_PROMPT))
        long = await self.median_seconds(lambda: self.time_prefill(self.long))
        prefill_s = seconds_per_token((SHORT_PROMPT, short), (self.long, long))
        request_s = short - SHORT_PROMPT * prefill_s
        if request_s <= 0:  # the long prompts were slow
            request_s = await self.median_seconds(lambda: self.time_commit(prompt))
        step_s, began = await self.time_decoding(prompt, 1, MIN_STEPS) / MIN_STEPS, self.clock()
        steps = list[tuple[float, float]]()
        for size in BATCH_SIZES:
            if len(steps) < 2 or self.clock() - began < SWEEP_LIMIT_S:
                step_s = await self.time_step(prompt, size, step_s)
                steps.append((float(size), step_s))
        return EngineCost(request_s, prefill_s, tuple(steps))

    async def time_step(self, prompt: tuple[int, ...], size: int, estimate_s: float) -> float:
        """Seconds of one decoding step of `size` requests, of which `estimate_s` is a first estimate."""
        steps = max(MIN_STEPS, min(MAX_STEPS - 1, int(TARGET_S / estimate_s))) if estimate_s else MIN_STEPS
        one = await self.median_seconds(lambda: self.time_decoding(prompt, size, 1))
        more = await self.median_seconds(lambda: self.time_decoding(prompt, size, 1 + steps))
        return seconds_per_token((1, one), (1 + steps, more))

    async def time_prefill(self, tokens: int) -> float:
        """Seconds to prefill a prompt of `tokens` tokens that is not in the cache."""
        return await self.time_commit(self.unique_prompt(tokens))

    async def time_commit(self, prompt: tuple[int, ...]) -> float:
        """Seconds of a request that only prefills what the cache does not hold of a prompt."""
        request = Request(self.new_request_id(), prompt)
        began = self.clock()
        await self.engine.commit(request)
        return self.clock() - began

    async def time_decoding(self, prompt: tuple[int, ...], size: int, tokens: int) -> float:
        """Seconds until `size` requests have decoded `tokens` tokens each."""
        sampling = {"temperature": 0, "ignore_eos": True}
        requests = [Request(self.new_request_id(), prompt, tokens, sampling) for _ in range(size)]
        began = self.clock()
        await asyncio.gather(*map(self.engine.decode, requests))
        return self.clock() - began

    async def median_seconds(self, measure: Callable[[], Awaitable[float]]) -> float:
        """The median of some runs of one measurement."""
        return median([await measure() for _ in range(REPEATS)])

    def unique_prompt(self, tokens: int) -> tuple[int, ...]:
        """A random prompt of `tokens` tokens that shares no prefix with any other."""
        text = ""
        while len(ids := self.engine.tokenizer.encode(text, add_special_tokens=True)) < tokens:
            text += f"{self.random.getrandbits(64)} "
        return tuple(ids[:tokens])

    def new_request_id(self) -> str:
        """An id that no other request has."""
        return f"apr-{uuid.uuid4().hex}"


async def load_or_measure_cost(
    url: str, path: Path | None = None, *, api_key: str | None = None
) -> EngineCost:
    """The cost of a server, read from a file if it exists, or else measured and written to it.

    Args:
        url: The server.
        path: The file; None only measures.
        api_key: Key of the server.

    Raises:
        AprError: The file cannot be read or written, or holds something else.
    """
    if path and path.exists():
        try:
            return EngineCost.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise file_error("cannot read", path, error) from None
    async with await HttpEngine.connect(url, api_key=api_key) as engine:
        cost = await EngineTimer(engine).measure_cost()
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(cost.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise file_error("cannot write to", path, error) from None
    return cost
