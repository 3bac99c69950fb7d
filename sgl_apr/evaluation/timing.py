"""The cost of an engine, measured by a few seconds of requests of its own; what others ask it meanwhile is in it."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable
from statistics import median

from sgl_apr.engine.base import Engine, Request
from sgl_apr.errors import AprError
from sgl_apr.evaluation.cost_model import Cost

SIZES = (1, 2, 4, 8, 16, 32, 64)
SHORT, LONG = 16, 512  # tokens of prompts
FEWEST, MOST = 4, 64  # steps of a request
TIMES, EACH_S = 3, 0.2  # how often it is timed (the middle one counts), and for about how long
LONGEST_S = 5.0  # of steps, behind which no larger number of requests is begun


class EngineTimer:
    """Times single requests for the prompt, and several at once behind a short one that is cached for their steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.random = engine, random.Random()
        self.long = LONG if engine.context is None else min(LONG, engine.context - 1)
        if self.long < SHORT + MOST:
            raise AprError(f"a context of {engine.context} tokens, expected more than {SHORT + MOST}")

    async def cost(self) -> Cost:
        """All of it; steps of one request and of two at least."""
        prompt = self.ids(SHORT)
        await self.decoding(prompt, 1, FEWEST)  # what is done for the first request only
        short = await self.middle(lambda: self.prompt(SHORT))
        long = await self.middle(lambda: self.prompt(self.long))
        prefill_s = max(0.0, long - short) / (self.long - SHORT)
        step_s, began = await self.decoding(prompt, 1, FEWEST) / FEWEST, _now()
        steps = list[tuple[float, float]]()
        for size in SIZES:
            if len(steps) < 2 or _now() - began < LONGEST_S:
                step_s = await self.step(prompt, size, step_s)
                steps.append((float(size), step_s))
        return Cost(max(0.0, short - SHORT * prefill_s), prefill_s, tuple(steps))

    async def step(self, prompt: tuple[int, ...], size: int, about: float) -> float:
        """Seconds of a step of so many requests, which takes about so long."""
        steps = max(FEWEST, min(MOST - 1, int(EACH_S / about))) if about else FEWEST
        one = await self.middle(lambda: self.decoding(prompt, size, 1))
        more = await self.middle(lambda: self.decoding(prompt, size, 1 + steps))
        return max(0.0, more - one) / steps

    async def prompt(self, tokens: int) -> float:
        """Seconds until a prompt is computed that no cache holds."""
        request = Request(self.rid(), self.ids(tokens))
        began = _now()
        await self.engine.commit(request)
        return _now() - began

    async def decoding(self, prompt: tuple[int, ...], size: int, tokens: int) -> float:
        """Seconds until so many requests have decoded so many tokens each."""
        sampling = {"temperature": 0, "ignore_eos": True}
        requests = [Request(self.rid(), prompt, tokens, sampling) for _ in range(size)]
        began = _now()
        await asyncio.gather(*map(self.engine.decode, requests))
        return _now() - began

    async def middle(self, timed: Callable[[], Awaitable[float]]) -> float:
        return median([await timed() for _ in range(TIMES)])

    def ids(self, tokens: int) -> tuple[int, ...]:
        """A text of that length, which no other begins like."""
        text = ""
        while len(ids := self.engine.tokenizer.encode(text, first=True)) < tokens:
            text += f"{self.random.getrandbits(64)} "
        return tuple(ids[:tokens])

    def rid(self) -> str:
        return f"apr-{uuid.uuid4().hex}"


def _now() -> float:
    return asyncio.get_running_loop().time()
