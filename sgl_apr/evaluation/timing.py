"""The cost of an engine, measured by a few seconds of requests of its own; what others ask it meanwhile is in it."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable
from statistics import median

from sgl_apr.engine.base import Engine, Request
from sgl_apr.errors import AprError
from sgl_apr.evaluation.cost_model import EngineCost

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
SHORT_PROMPT, LONG_PROMPT = 16, 512  # tokens of prompts
MIN_STEPS, MAX_STEPS = 4, 64  # steps of a request
REPEATS, TARGET_S = 3, 0.2  # how often it is timed (the middle one counts), and for about how long
SWEEP_LIMIT_S = 5.0  # of steps, behind which no larger number of requests is begun


class EngineTimer:
    """Times single requests for the prompt, and several at once behind a short one that is cached for their steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.random = engine, random.Random()
        self.long = LONG_PROMPT if engine.context is None else min(LONG_PROMPT, engine.context - 1)
        if self.long < SHORT_PROMPT + MAX_STEPS:
            raise AprError(
                f"a context of {engine.context} tokens, expected more than {SHORT_PROMPT + MAX_STEPS}"
            )

    async def measure_cost(self) -> EngineCost:
        """All of it; steps of one request and of two at least."""
        prompt = self.unique_prompt(SHORT_PROMPT)
        await self.time_decoding(prompt, 1, MIN_STEPS)  # what is done for the first request only
        short = await self.median_seconds(lambda: self.time_prefill(SHORT_PROMPT))
        long = await self.median_seconds(lambda: self.time_prefill(self.long))
        prefill_s = max(0.0, long - short) / (self.long - SHORT_PROMPT)
        step_s, began = await self.time_decoding(prompt, 1, MIN_STEPS) / MIN_STEPS, _now()
        steps = list[tuple[float, float]]()
        for size in BATCH_SIZES:
            if len(steps) < 2 or _now() - began < SWEEP_LIMIT_S:
                step_s = await self.time_step(prompt, size, step_s)
                steps.append((float(size), step_s))
        return EngineCost(max(0.0, short - SHORT_PROMPT * prefill_s), prefill_s, tuple(steps))

    async def time_step(self, prompt: tuple[int, ...], size: int, about: float) -> float:
        """Seconds of a step of so many requests, which takes about so long."""
        steps = max(MIN_STEPS, min(MAX_STEPS - 1, int(TARGET_S / about))) if about else MIN_STEPS
        one = await self.median_seconds(lambda: self.time_decoding(prompt, size, 1))
        more = await self.median_seconds(lambda: self.time_decoding(prompt, size, 1 + steps))
        return max(0.0, more - one) / steps

    async def time_prefill(self, tokens: int) -> float:
        """Seconds until a prompt is computed that no cache holds."""
        request = Request(self.new_request_id(), self.unique_prompt(tokens))
        began = _now()
        await self.engine.commit(request)
        return _now() - began

    async def time_decoding(self, prompt: tuple[int, ...], size: int, tokens: int) -> float:
        """Seconds until so many requests have decoded so many tokens each."""
        sampling = {"temperature": 0, "ignore_eos": True}
        requests = [Request(self.new_request_id(), prompt, tokens, sampling) for _ in range(size)]
        began = _now()
        await asyncio.gather(*map(self.engine.decode, requests))
        return _now() - began

    async def median_seconds(self, timed: Callable[[], Awaitable[float]]) -> float:
        return median([await timed() for _ in range(REPEATS)])

    def unique_prompt(self, tokens: int) -> tuple[int, ...]:
        """A text of that length, which no other begins like."""
        text = ""
        while len(ids := self.engine.tokenizer.encode(text, add_special_tokens=True)) < tokens:
            text += f"{self.random.getrandbits(64)} "
        return tuple(ids[:tokens])

    def new_request_id(self) -> str:
        return f"apr-{uuid.uuid4().hex}"


def _now() -> float:
    return asyncio.get_running_loop().time()
