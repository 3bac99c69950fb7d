"""An event loop in virtual time: nothing is waited for, and nothing depends on how fast the machine is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to whatever is due next, so that hours take no time and nothing depends on the machine."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        select = self._selector.select

        def jump(timeout: float | None = None):
            self.now += timeout or 0
            return select(0 if timeout else timeout)

        self._selector.select = jump

    def time(self) -> float:
        return self.now


def run(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """What it returns, and how many seconds it took by the virtual clock."""

    async def timed() -> tuple[T, float]:
        result = await work
        return result, asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(timed())
