"""A request that is sent before the branch exists that it belongs to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from sgl_apr.engine.base import Engine, Request, Result, TokenSink
from sgl_apr.engine.sglang_request import INTERVAL_PARAM

CHUNK_TOKENS = 16  # of a request whose single tokens nobody waits for


class EagerRequest:
    """A request of a branch that is sent before its fork is complete. Its tokens wait for the branch.

    Args:
        engine: Decodes.
        request: The request.
        tasks: Runs it.
        quiet: Nobody waits for single tokens, so that they may come in larger chunks, which take less time.

    Attributes:
        started: When it was sent, on the monotonic clock.
    """

    def __init__(
        self, engine: Engine, request: Request, tasks: asyncio.TaskGroup, *, quiet: bool = False
    ) -> None:
        self.request, self.started = request, time.monotonic()
        default = getattr(engine, "default_interval", None)  # None where a request cannot set it
        self._sent = request
        if quiet and default is not None and default < CHUNK_TOKENS:
            self._sent = replace(request, sampling={INTERVAL_PARAM: CHUNK_TOKENS, **request.sampling})
        self._ids: list[int] = []
        self._changed = asyncio.Event()
        self._outcome: Result | Exception | None = None
        self._task = tasks.create_task(self._run(engine))

    async def _run(self, engine: Engine) -> None:
        try:
            self._outcome = await engine.decode(self._sent, self._receive)
        except Exception as error:  # it is raised where the branch takes the request
            self._outcome = error
        finally:
            self._changed.set()

    def _receive(self, ids: Sequence[int]) -> None:
        self._ids += ids
        self._changed.set()

    def cancel(self) -> None:
        """Stop the request. The engine aborts it."""
        self._task.cancel()

    def stands_for(self, request: Request) -> bool:
        """Whether the tokens of `request` are the first ones of this request."""
        same = replace(self.request, rid=request.rid, max_tokens=request.max_tokens) == request
        return same and request.max_tokens <= self.request.max_tokens

    async def result(self, max_tokens: int, on_tokens: TokenSink) -> Result:
        """Return the result of the same request with another limit.

        Args:
            max_tokens: The limit.
            on_tokens: Receives the ids of each chunk.

        Raises:
            Exception: The engine failed.
        """
        sent = 0
        try:
            while True:
                self._changed.clear()
                if new := self._ids[sent:max_tokens]:
                    sent += len(new)
                    on_tokens(new)
                # Only a request that ends by itself returns log-probabilities.
                exceeded = len(self._ids) > max_tokens and not self.request.logprobs
                if exceeded or self._outcome is not None:
                    break
                await self._changed.wait()
        finally:
            self.cancel()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        if self._outcome is None:
            return Result(tuple(self._ids[:max_tokens]), "length", len(self.request.input_ids), None)
        return _limited(self._outcome, max_tokens)


def _limited(result: Result, max_tokens: int) -> Result:
    """A result with at most so many tokens."""
    if len(result.token_ids) <= max_tokens:
        return result
    return replace(
        result,
        token_ids=result.token_ids[:max_tokens],
        finish="length",
        logprobs=result.logprobs and result.logprobs[:max_tokens],
        top_logprobs=result.top_logprobs and result.top_logprobs[:max_tokens],
    )
