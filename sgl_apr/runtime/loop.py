"""The one loop: decode the trunk, fork, decode the branches at once, join, go on; over any engine."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import BudgetExceeded, KvJoinUnavailable
from sgl_apr.formats.dialects import Dialect, Phase
from sgl_apr.runtime import telemetry
from sgl_apr.runtime.allocation import Allowance, BudgetAllocator
from sgl_apr.runtime.async_branches import AsyncBranches
from sgl_apr.runtime.branches import Branches, first_error
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.decoder import RequestRunner
from sgl_apr.runtime.events import Event, OnEvent
from sgl_apr.runtime.fork_rules import ForkRules
from sgl_apr.runtime.options import ReasonOptions, make_options
from sgl_apr.runtime.pacing import Demand
from sgl_apr.runtime.phase_output import closing_overhead
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory

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
    return await run_with_options(engine, ids, make_options(dialect, tokenizer, **options), on_event)


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


async def run_with_options(
    engine: Engine, prompt_ids: tuple[int, ...], plan: ReasonOptions, on_event: OnEvent | None = None
) -> Trajectory:
    """`areason` for ids and a plan."""
    if plan.join == "kv" and not engine.joins_kv:
        raise KvJoinUnavailable(
            'join="kv" needs an engine that joins in its KV cache: `sgl-apr serve` starts one where that '
            "works, and says so where it does not"
        )
    tasks = asyncio.TaskGroup()
    run = _ReasoningRun(engine, plan, on_event, tasks)
    try:
        async with tasks:
            trajectory = await run.trajectory(engine, prompt_ids)
    except BaseException as failed:  # a failure or a cancellation: nothing of it goes on decoding
        error = first_error(failed) if isinstance(failed, BaseExceptionGroup) else failed
        run.report(error)
        await asyncio.shield(engine.abort(run.rid))
        raise error from error.__cause__
    run.report(None)
    return trajectory


class _ReasoningRun:
    """One trajectory under way."""

    def __init__(
        self, engine: Engine, plan: ReasonOptions, on_event: OnEvent | None, tasks: asyncio.TaskGroup
    ) -> None:
        self.plan, self.dialect, self.context = plan, plan.dialect, engine.context
        self.rid = f"apr-{uuid.uuid4().hex}"
        self.seed = plan.seed if plan.seed is not None else random.getrandbits(31)
        self.record = TrajectoryRecorder(engine.tokenizer, on_event)
        o = closing_overhead(self.dialect, engine.tokenizer)
        if plan.branch_prompt_template:
            o = replace(
                o, branch=o.branch + len(engine.tokenizer.encode(plan.branch_prompt_template(""), first=True))
            )
        self.allocator = BudgetAllocator(
            plan.budget, o, self.dialect.branch_context == "message", plan.join == "kv"
        )
        self.decoder = RequestRunner(engine, plan, self.record, self.rid, self.seed)
        self.forks = ForkRules(plan, self.allocator, self.record)
        self.branches = Branches(self.decoder, self.allocator, self.run_sequence)
        self.async_branches = AsyncBranches(self.branches, tasks)

    async def trajectory(self, engine: Engine, prompt_ids: tuple[int, ...]) -> Trajectory:
        """All of it, from the prompt to the end of the trunk."""
        seconds = self.plan.budget.seconds
        deadline = asyncio.get_running_loop().time() + seconds if seconds is not None else None
        scope = CancelScope(None, deadline, "seconds")
        trunk = self.record.trunk(prompt_ids, self.initial_allowance(len(prompt_ids)), scope)
        try:
            await self.run_sequence(engine, trunk, "trunk", len(prompt_ids))
        finally:
            await self.async_branches.release()
        return self.record.finish(trunk, self.dialect.name, self.seed, self.decoder.supports_seeds)

    def initial_allowance(self, prompt: int) -> Allowance:
        """All of the budget, or what the engine's context leaves of it where all that is written ends up in one."""
        allowance = Allowance.of(self.plan.budget)
        if self.context is None:
            return allowance
        if (left := self.context - prompt) < 1:
            raise BudgetExceeded(
                f"the prompt has {prompt} tokens, expected fewer than the {self.context} of the engine's context"
            )
        if left < allowance.tokens and not self.allocator.joins_by_message:
            allowance.tokens, allowance.limiting_field = left, "context"
        return allowance

    def max_new_tokens(self, sequence: SequenceState, width: int, phase: Phase) -> tuple[int, str]:
        """Tokens that the next request may decode, and the limit that they come from."""
        tokens, limit = self.forks.max_new_tokens(sequence, width, phase)
        if self.context is not None:
            close = self.allocator.overhead.of(width + sequence.waiting)
            left = self.context - len(sequence.context) - close
            if left < tokens:
                return left, "context"
        return tokens, limit

    async def run_sequence(
        self, engine: Engine | None, sequence: SequenceState, phase: Phase, new: int
    ) -> None:
        """Decode, fork and join until the sequence ends; `new` prompt tokens are unknown to the engine yet."""
        behind: Phase = "after" if phase == "trunk" else "rejoin"
        if phase == "trunk" and phase not in self.dialect.grammar.rules:
            if not (width := self.forks.affordable_width(sequence)):
                self.forks.raise_unaffordable(sequence)
            outlines = self.forks.outlines(width)
            new, phase = await self.branches.fork_and_join(engine, sequence, outlines, new), behind
        while True:
            width, fork = self.forks.next_fork(sequence)
            if (
                engine
                and self.plan.cap_width_by_load
                and width > self.plan.min_branches
                and not sequence.waiting
            ):
                width = await self._cap_width_by_load(engine, sequence, width)
            room = self.max_new_tokens(sequence, width, phase)
            step, call = await self.decoder.decode(engine, sequence, phase, new, room, (width, fork))
            if step.forked and fork == "forbidden" and not self.forks.can_afford(sequence, step):
                step = replace(step, finish="malformed", forked=False)
            self.record.append(sequence, step, call)
            if step.is_final:
                break
            if step.wait is not None:
                new = await self.async_branches.join(sequence, step.wait)
            elif self.dialect.asynchronous:
                new = await self.async_branches.spawn(engine, sequence, step.outlines[0])
            else:
                outlines = step.outlines
                if (
                    self.dialect.unlabelled_branches
                ):  # unconstrained, also where none was allowed: `Forks.bears` saw to it
                    outlines = self.forks.outlines(width or self.plan.min_branches)
                new = await self.branches.fork_and_join(engine, sequence, outlines)
            phase = behind
        await self.async_branches.join_remaining(sequence)

    async def _cap_width_by_load(self, engine: Engine, sequence: SequenceState, width: int) -> int:
        """No wider than would run at once, if the engine says how busy it is."""
        load = await self.decoder.load(engine, sequence)
        if load is None or self.plan.pacing is None:
            return width
        share = self.allocator.branch_allowance(
            sequence.allowance, self.record.critical_path_to(sequence), width
        )
        at_once, reason = self.plan.pacing(Demand(width, share.tokens), load)
        narrow = max(self.plan.min_branches, min(width, at_once))
        if narrow < width:
            self.record.record_pacing(
                sequence, sequence.blocks + 1, width, narrow, load, f"narrowed: {reason}"
            )
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
