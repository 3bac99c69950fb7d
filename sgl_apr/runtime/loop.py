"""The one loop: decode the trunk, fork, decode the branches at once, join, go on; over any engine."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from sgl_apr import telemetry
from sgl_apr.dialects import Dialect, Phase
from sgl_apr.engine.base import Engine
from sgl_apr.errors import BudgetExceeded, KvJoinUnavailable
from sgl_apr.runtime.ahead import Spawned
from sgl_apr.runtime.branches import Branches, first
from sgl_apr.runtime.decoding import Decoder
from sgl_apr.runtime.events import Event, OnEvent
from sgl_apr.runtime.forks import Forks
from sgl_apr.runtime.pacing import Demand
from sgl_apr.runtime.plan import Plan, plan
from sgl_apr.runtime.purse import Divider, Purse
from sgl_apr.runtime.record import Record, Strand
from sgl_apr.runtime.scope import Scope
from sgl_apr.runtime.steps import overhead
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory import Trajectory

log = logging.getLogger(__name__)


async def areason(
    engine: Engine,
    prompt: str | Sequence[int],
    dialect: Dialect | str | None = None,
    *,
    on_event: OnEvent | None = None,
    **options: Any,
) -> Trajectory:
    """Let the model behind `engine` answer `prompt` (text, or ids that are sent as they are).

    Without a `dialect` it is the one whose tags the model's tokenizer has, else "threadweaver".
    Options are the fields of `Plan`; any other is a sampling parameter (temperature, ...).
    `on_event` hears what happens as it happens (see `sgl_apr.runtime.events`).
    Raises an `EngineError` when the engine fails for good where no branch can be blamed, or where a failed
    branch is to raise, with every other request of the trajectory aborted; and `BudgetExceeded` for a
    budget in which nothing fits, or a prompt that the engine's context does not hold. A budget above that
    context is cut to it.
    """
    tokenizer = engine.tokenizer
    ids = tuple(tokenizer.encode(prompt, first=True)) if isinstance(prompt, str) else tuple(prompt)
    return await run_plan(engine, ids, plan(dialect, tokenizer, **options), on_event)


async def stream(
    engine: Engine, prompt: str | Sequence[int], dialect: Dialect | str | None = None, **options: Any
) -> AsyncIterator[Event]:
    """The events of `areason` as they happen; `apr.rebuild` makes the trajectory of them.

    Raises what `areason` raises, behind the events before it. Leaving the iteration early cancels the
    trajectory (at once inside `contextlib.aclosing`).

    >>> async for event in apr.stream(engine, "Question: ..."):  # doctest: +SKIP
    ...     if isinstance(event, apr.Delta):
    ...         print(event.path, event.text)
    """
    events = asyncio.Queue[Event | None]()
    task = asyncio.create_task(areason(engine, prompt, dialect, on_event=events.put_nowait, **options))
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def run(
    url: str,
    prompt: str | Sequence[int],
    dialect: Dialect | str | None = None,
    *,
    api_key: str | None = None,
    tokenizer: Tokenizer | None = None,
    timeout: float = 120.0,
    on_event: OnEvent | None = None,
    **options: Any,
) -> Trajectory:
    """`areason` against the server at `url`, blocking: for scripts without an event loop."""
    from sgl_apr.engine.http import HttpEngine

    async def once() -> Trajectory:
        async with await HttpEngine.connect(
            url, api_key=api_key, tokenizer=tokenizer, timeout=timeout
        ) as engine:
            return await areason(engine, prompt, dialect, on_event=on_event, **options)

    return asyncio.run(once())


async def run_plan(
    engine: Engine, prompt_ids: tuple[int, ...], plan: Plan, on_event: OnEvent | None = None
) -> Trajectory:
    """`areason` for ids and a plan."""
    if plan.join == "kv" and not engine.joins_kv:
        raise KvJoinUnavailable(
            'join="kv" needs an engine that joins in its KV cache: `sgl-apr serve` starts one where that '
            "works, and says so where it does not"
        )
    tasks = asyncio.TaskGroup()
    run = _Run(engine, plan, on_event, tasks)
    try:
        async with tasks:
            trajectory = await run.trajectory(engine, prompt_ids)
    except BaseException as failed:  # a failure or a cancellation: nothing of it goes on decoding
        error = first(failed) if isinstance(failed, BaseExceptionGroup) else failed
        run.report(error)
        await asyncio.shield(engine.abort(run.rid))
        raise error from error.__cause__
    run.report(None)
    return trajectory


class _Run:
    """One trajectory under way."""

    def __init__(
        self, engine: Engine, plan: Plan, on_event: OnEvent | None, tasks: asyncio.TaskGroup
    ) -> None:
        self.plan, self.dialect, self.context = plan, plan.dialect, engine.context
        self.rid = f"apr-{uuid.uuid4().hex}"
        self.seed = plan.seed if plan.seed is not None else random.getrandbits(31)
        self.record = Record(engine.tokenizer, on_event)
        o = overhead(self.dialect, engine.tokenizer)
        if plan.wrap:
            o = replace(o, branch=o.branch + len(engine.tokenizer.encode(plan.wrap(""), first=True)))
        self.divider = Divider(plan.budget, o, self.dialect.sees == "message", plan.join == "kv")
        self.decoder = Decoder(engine, plan, self.record, self.rid, self.seed)
        self.forks = Forks(plan, self.divider, self.record)
        self.branches = Branches(self.decoder, self.divider, self.think)
        self.spawned = Spawned(self.branches, tasks)

    async def trajectory(self, engine: Engine, prompt_ids: tuple[int, ...]) -> Trajectory:
        """All of it, from the prompt to the end of the trunk."""
        seconds = self.plan.budget.seconds
        deadline = asyncio.get_running_loop().time() + seconds if seconds is not None else None
        scope = Scope(None, deadline, "seconds")
        trunk = self.record.trunk(prompt_ids, self.purse(len(prompt_ids)), scope)
        try:
            await self.think(engine, trunk, "trunk", len(prompt_ids))
        finally:
            await self.spawned.release()
        return self.record.finish(trunk, self.dialect.name, self.seed, self.decoder.seeded)

    def purse(self, prompt: int) -> Purse:
        """All of the budget, or what the engine's context leaves of it where all that is written ends up in one."""
        purse = Purse.of(self.plan.budget)
        if self.context is None:
            return purse
        if (left := self.context - prompt) < 1:
            raise BudgetExceeded(
                f"the prompt has {prompt} tokens, expected fewer than the {self.context} of the engine's context"
            )
        if left < purse.tokens and not self.divider.returned:
            purse.tokens, purse.bound = left, "context"
        return purse

    def room(self, strand: Strand, width: int, phase: Phase) -> tuple[int, str]:
        """Tokens that the next request may decode, and the limit that they come from."""
        tokens, limit = self.forks.room(strand, width, phase)
        if self.context is not None:
            close = self.divider.overhead.of(width + strand.waiting)
            left = self.context - len(strand.context) - close
            if left < tokens:
                return left, "context"
        return tokens, limit

    async def think(self, engine: Engine | None, strand: Strand, phase: Phase, new: int) -> None:
        """Decode, fork and join until the strand ends; `new` prompt tokens are unknown to the engine yet."""
        behind: Phase = "after" if phase == "trunk" else "rejoin"
        if phase == "trunk" and phase not in self.dialect.grammar.rules:
            if not (width := self.forks.width(strand)):
                self.forks.refuse(strand)
            outlines = self.forks.outlines(width)
            new, phase = await self.branches.fork_and_join(engine, strand, outlines, new), behind
        while True:
            width, fork = self.forks.allowed(strand)
            if engine and self.plan.narrow and width > self.plan.least and not strand.waiting:
                width = await self._narrowed(engine, strand, width)
            room = self.room(strand, width, phase)
            step, call = await self.decoder.decode(engine, strand, phase, new, room, (width, fork))
            if step.forked and fork == "forbidden" and not self.forks.bears(strand, step):
                step = replace(step, finish="malformed", forked=False)
            self.record.append(strand, step, call)
            if step.over:
                break
            if step.wait is not None:
                new = await self.spawned.join(strand, step.wait)
            elif self.dialect.asynchronous:
                new = await self.spawned.spawn(engine, strand, step.outlines[0])
            else:
                outlines = step.outlines
                if self.dialect.seeded:  # unconstrained, also where none was allowed: `Forks.bears` saw to it
                    outlines = self.forks.outlines(width or self.plan.least)
                new = await self.branches.fork_and_join(engine, strand, outlines)
            phase = behind
        await self.spawned.join_rest(strand)

    async def _narrowed(self, engine: Engine, strand: Strand, width: int) -> int:
        """No wider than would run at once, if the engine says how busy it is."""
        load = await self.decoder.load(engine, strand)
        if load is None or self.plan.pacing is None:
            return width
        share = self.divider.share(strand.purse, self.record.reach(strand), width)
        at_once, reason = self.plan.pacing(Demand(width, share.tokens), load)
        narrow = max(self.plan.least, min(width, at_once))
        if narrow < width:
            self.record.decide(strand, strand.blocks + 1, width, narrow, load, f"narrowed: {reason}")
        return narrow

    def report(self, error: BaseException | None) -> None:
        """To the log, and to OpenTelemetry if it is there."""
        record = self.record
        tokens = sum(s.tokens for s in record.spans if s.origin != "prompt")
        log.info(
            "%s: %s, %d tokens in %d calls",
            self.rid,
            repr(error) if error else "done",
            tokens,
            len(record.calls),
        )
        telemetry.export(
            self.dialect.name,
            record.calls,
            record.seconds,
            attributes={"apr.rid": self.rid, "apr.tokens": tokens},
            error=error,
        )
