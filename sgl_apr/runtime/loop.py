"""The one loop: decode the trunk, fork, decode the branches at once, join, go on; over any engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sgl_apr.budget import branch_tokens, lead_chars, trunk_tokens
from sgl_apr.completion import FILLER
from sgl_apr.dialects import Dialect, Phase, Place
from sgl_apr.engine.base import Engine, Request, Result
from sgl_apr.errors import BranchFailed, BudgetExceeded, EngineError, EngineTimeout
from sgl_apr.lowering import Backend, Fork
from sgl_apr.messages import brief
from sgl_apr.runtime.plan import Plan, plan
from sgl_apr.runtime.record import Ahead, OnText, Record, Strand
from sgl_apr.runtime.steps import Step, interpret, overhead
from sgl_apr.runtime.stream import TextStream
from sgl_apr.segments import Outline
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory import Finish, Trajectory


async def areason(
    engine: Engine,
    prompt: str | Sequence[int],
    dialect: Dialect | str | None = None,
    *,
    on_text: OnText | None = None,
    **options: Any,
) -> Trajectory:
    """Let the model behind `engine` answer `prompt` (text, or ids that are sent as they are).

    Without a `dialect` it is the one whose tags the model's tokenizer has, else "threadweaver".
    Options are the fields of `Plan`; any other is a sampling parameter (temperature, ...).
    `on_text(path, text)` hears every piece of text as it is written, decoded or injected.
    Raises an `EngineError` when the engine fails, with every other request of the trajectory
    aborted, and `BudgetExceeded` for a budget in which nothing fits.
    """
    tokenizer = engine.tokenizer
    ids = tuple(tokenizer.encode(prompt, first=True)) if isinstance(prompt, str) else tuple(prompt)
    return await run_plan(engine, ids, plan(dialect, tokenizer, **options), on_text)


def run(
    url: str,
    prompt: str | Sequence[int],
    dialect: Dialect | str | None = None,
    *,
    api_key: str | None = None,
    tokenizer: Tokenizer | None = None,
    timeout: float = 120.0,
    on_text: OnText | None = None,
    **options: Any,
) -> Trajectory:
    """`areason` against the server at `url`, blocking: for scripts without an event loop."""
    from sgl_apr.engine.http import HttpEngine

    async def once() -> Trajectory:
        async with await HttpEngine.connect(
            url, api_key=api_key, tokenizer=tokenizer, timeout=timeout
        ) as engine:
            return await areason(engine, prompt, dialect, on_text=on_text, **options)

    return asyncio.run(once())


async def run_plan(
    engine: Engine, prompt_ids: tuple[int, ...], plan: Plan, on_text: OnText | None = None
) -> Trajectory:
    """`areason` for ids and a plan."""
    run = _Run(engine.tokenizer, plan, on_text or (lambda path, text: None), engine.grammar_backend)
    try:
        async with asyncio.timeout(plan.budget.seconds), asyncio.TaskGroup() as tasks:
            return await run.trajectory(engine, prompt_ids, tasks)
    except BaseExceptionGroup as failed:
        await asyncio.shield(engine.abort(run.rid))
        raise _first(failed) from _first(failed).__cause__
    except TimeoutError:
        await engine.abort(run.rid)
        raise EngineTimeout(
            f"the trajectory took longer than its budget of {plan.budget.seconds} s"
        ) from None
    except BaseException:  # a failure or a cancellation: nothing of this trajectory goes on decoding
        await asyncio.shield(engine.abort(run.rid))
        raise


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """What failed first; a group cancels and awaits its other tasks before it raises."""
    error = failed.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


class _Run:
    """One trajectory under way: the spans and calls so far."""

    def __init__(self, tokenizer: Tokenizer, plan: Plan, on_text: OnText, backend: Backend) -> None:
        self.tokenizer, self.plan = tokenizer, plan
        self.dialect, self.grammar = plan.dialect, plan.dialect.grammar
        self.record = Record(tokenizer, on_text)
        self.backend = backend
        self.rid = f"apr-{uuid.uuid4().hex}"
        self.overhead = overhead(plan.dialect, tokenizer)
        if plan.wrap:
            wrapping = len(tokenizer.encode(plan.wrap(""), first=True))
            self.overhead = replace(self.overhead, branch=self.overhead.branch + wrapping)
        self.ahead: list[Engine] = []  # of branches that run while the trunk goes on

    async def trajectory(
        self, engine: Engine, prompt_ids: tuple[int, ...], tasks: asyncio.TaskGroup
    ) -> Trajectory:
        self.tasks = tasks  # the same branches
        trunk = self.record.trunk(prompt_ids, self.plan.budget.tokens)
        try:
            await self._think(engine, trunk, "trunk", new=len(prompt_ids))
        finally:
            for forked in self.ahead:
                await forked.release()
        return self.record.trajectory(trunk, self.dialect.name)

    async def _think(self, engine: Engine, strand: Strand, phase: Phase, new: int) -> None:
        """Decode, fork and join until the strand ends; `new` prompt tokens are unknown to the engine yet."""
        behind: Phase = "after" if phase == "trunk" else "rejoin"
        if phase == "trunk" and phase not in self.grammar.rules:
            self._check_fits(strand)
            new, phase = await self._fork_and_join(engine, strand, self._seeds(strand)), behind
        while True:
            width, fork = self._fork_rule(strand)
            step, call = await self._decode(engine, strand, phase, new, width, fork)
            if step.forked and fork == "forbidden" and not self._bears(strand, step):
                step = replace(step, finish="malformed", forked=False)
            self.record.append(strand, step, call)
            if step.over:
                break
            if step.wait is not None:
                new = await self._join(strand, step.wait)
            elif self.dialect.asynchronous:
                new = await self._spawn(engine, strand, step.outlines[0])
            else:
                outlines = self._seeds(strand, width) if self.dialect.seeded else step.outlines
                new = await self._fork_and_join(engine, strand, outlines)
            phase = behind
        while strand.ahead and strand.ahead.running:  # its tokens ran out before it asked for them
            number = next(iter(strand.ahead.running))
            self.record.inject(strand, "wait", self.grammar.written("wait", number))
            await self._join(strand, number)

    def _seeds(self, strand: Strand, width: int | None = None) -> tuple[Outline, ...]:
        """Outlines of branches that differ by chance, or by their number alone."""
        width = width or max(self._fits(strand))
        return tuple(Outline(str(self.dialect.first + k), "", 0) for k in range(width))

    def _fits(self, strand: Strand) -> list[int]:
        """Widths, largest first, of which at least half of what is left is not spent on tags."""
        widths = range(self.plan.width, self.plan.least - 1, -1)
        return [w for w in widths if 2 * self.overhead.of(w) <= strand.left]

    def _check_fits(self, strand: Strand) -> None:
        if not self._fits(strand):
            need = 2 * self.overhead.of(self.plan.least)
            raise BudgetExceeded(
                f"a fork needs at least {need} tokens here, and {strand.left} are left of {self.plan.budget}"
            )

    def _fork_rule(self, strand: Strand) -> tuple[int, Fork]:
        """How wide the next fork may be, and whether it has to come, may come, or may not (width 0)."""
        plan, trunk = self.plan, not strand.path
        if strand.depth >= plan.budget.depth or "fork" not in self.grammar.rules:
            return 0, "forbidden"
        if strand.ahead and strand.ahead.running:  # the open block may have more branches
            more = 2 * self.overhead.of(len(strand.ahead.running) + 1) <= strand.left
            return plan.width, "auto" if more and strand.ahead.forked < plan.width else "forbidden"
        required = trunk and strand.blocks < plan.min_blocks
        if required:
            self._check_fits(strand)
        fits = self._fits(strand)
        if not fits or (trunk and plan.max_blocks is not None and strand.blocks >= plan.max_blocks):
            return 0, "forbidden"
        return fits[0], "required" if required else "auto"

    def _bears(self, strand: Strand, step: Step) -> bool:
        """Whether a fork can be run that no grammar held back."""
        plan, branches = self.plan, len(step.outlines) or self.plan.least
        full = not strand.path and plan.max_blocks is not None and strand.blocks >= plan.max_blocks
        need = self.overhead.of(branches) - self.overhead.fork + len(step.token_ids)
        return strand.depth < plan.budget.depth and not full and need <= strand.left

    def _place(self, strand: Strand) -> Place:
        if self.dialect.asynchronous and not strand.path:
            ahead = strand.ahead or Ahead()
            next_ = str(self.dialect.first + (ahead.forked if ahead.running else 0))
            return Place(number=next_, waiting=tuple(ahead.running))
        return Place(prefix=f"{strand.number}." if strand.path else "", number=strand.number)

    async def _decode(
        self, engine: Engine, strand: Strand, phase: Phase, new: int, width: int, fork: Fork
    ) -> tuple[Step, int | None]:
        """One request and what it means; no request if there is nothing left to decode."""
        context, place = strand.context, self._place(strand)
        reserve = len(strand.ahead.running) if strand.ahead else 0
        tokens = (
            strand.left
            if strand.path and not width
            else trunk_tokens(strand.left, self.overhead, width + reserve)
        )
        result, call = Result((), "length", 0, 0), None
        cut: Finish | None = None
        stream = TextStream(self.tokenizer, context, lambda text: self.record.on_text(strand.path, text))
        if tokens > 0:
            request = self._request(context, phase, place, tokens, width, fork)
            started, heard = time.monotonic(), list[int]()

            def sink(ids: Sequence[int]) -> None:
                heard.extend(ids)
                stream(ids)

            try:
                result = await engine.decode(request, sink)
            except asyncio.CancelledError:
                if not strand.given_up:
                    raise
                asyncio.current_task().uncancel()  # type: ignore[union-attr]  # we run in one
                result, cut = Result(tuple(heard), "length", len(context), 0), "cancelled"
            call = self.record.call("branch" if strand.path else phase, strand.path, result, new, started)
        cut = cut or ("length" if result.finish == "length" else None)
        step = interpret(self.dialect, phase, place, context, result.token_ids, cut, self.tokenizer)
        stream.finish(step)
        return step, call

    def _request(
        self, context: tuple[int, ...], phase: Phase, place: Place, tokens: int, width: int, fork: Fork
    ) -> Request:
        plan, dialect, grammar = self.plan, self.dialect, None
        if plan.constrain:
            grammar = dialect.lower(
                phase,
                self.tokenizer,
                self.backend,
                width=max(width, plan.least),
                min_width=plan.least,
                fork="auto" if dialect.rule_of(phase) == "body" else fork,
                prefix=place.prefix,
                number=place.number,
                waiting=place.waiting,
                lead_chars=lead_chars(tokens) if fork == "required" else None,
                outline_chars=plan.budget.outline_chars,
                plain=plan.plain,
            )
        stops = dialect.stops(phase, place)
        special = [self.tokenizer.special(tag) for tag in stops]
        return Request(
            rid=self._new_rid(),
            input_ids=context,
            max_tokens=tokens,
            sampling=plan.sampling,
            grammar=grammar,
            stop_ids=tuple(i for i in special if i is not None),
            stop=tuple(t for t, i in zip(stops, special, strict=True) if i is None),
        )

    async def _fork_and_join(self, engine: Engine, strand: Strand, outlines: Sequence[Outline]) -> int:
        """Run one branch per outline at once, and leave in the strand what comes of them. Returns its new tokens."""
        strand.blocks += 1
        fork = strand.order[-1]
        if self.dialect.drops_calls:
            self._drop(strand)
        else:
            self.record.inject(strand, "lead", self.grammar.written("lead"))
        returned = self.dialect.sees == "message"
        limit = self.plan.budget.branch_tokens
        share = branch_tokens(strand.left, self.overhead, len(outlines), limit, returned=returned)
        engines = await self._commit(engine, strand, len(outlines))
        branches = [self._branch(strand, k, outline, share, (fork,)) for k, outline in enumerate(outlines, 1)]
        prefix = 0 if returned else len(strand.context)
        try:
            await self._run_branches(engines, branches, prefix)
        finally:
            for forked in engines:
                await forked.release()
        for branch in branches:
            self._take(strand, branch)
        if returned:
            return self._results(strand, branches, share)
        strand.tip = tuple(tip for b in branches for tip in b.tip)
        for branch in branches:
            strand.context += branch.context[prefix:]
        before = len(strand.context)
        self.record.inject(strand, "tail", self.grammar.written("tail"))
        tail = len(strand.context) - before
        return tail + sum(self.record.unknown(branch) for branch in branches)

    async def _commit(self, engine: Engine, strand: Strand, size: int) -> Sequence[Engine]:
        started = time.monotonic()
        committed, engines = await engine.fork(self._new_rid(), strand.context, size)
        self.record.call("commit", strand.path, committed, self.record.unknown(strand), started)
        return engines

    def _branch(self, strand: Strand, k: int, outline: Outline, share: int, after: tuple[int, ...]) -> Strand:
        """A branch with its header, or with its message in a context of its own."""
        number = outline.number or str(self.dialect.first + k - 1)
        path = (*strand.path, strand.blocks, k)
        if self.dialect.sees == "prefix":
            branch = Strand(path, strand.context, strand.tip, share, number=number, outline=outline.text)
            text = self.grammar.written("header", number)
        else:
            branch = Strand(path, (), (), share, number=number, outline=outline.text, after=after)
            told = brief(self.dialect.brief).tell(self.tokenizer.decode(strand.context), outline.text)
            told = self._shortened(told, share) or FILLER  # it comes out of the branch's share
            text = self.plan.wrap(told) if self.plan.wrap else told
        self.record.inject(branch, "header", text, label=outline.text)
        if self.dialect.sees == "prefix":
            branch.left = share  # a header comes out of the overhead
        branch.after = ()
        return branch

    def _shortened(self, text: str, most: int) -> str:
        ids = self.tokenizer.encode(text)
        return text if len(ids) <= most else self.tokenizer.decode(ids[:most])

    async def _run_branches(self, engines: Sequence[Engine], branches: Sequence[Strand], prefix: int) -> None:
        """Until enough of them have ended; the others are cut where they are."""
        quorum = self.plan.quorum(len(branches))
        ended = 0
        tasks: list[asyncio.Task[None]] = []

        async def run(engine: Engine, branch: Strand) -> None:
            nonlocal ended
            await self._run_branch(engine, branch, len(branch.context) - prefix)
            ended += 1
            if ended == quorum:
                for other, task in zip(branches, tasks, strict=True):
                    other.given_up = not task.done() and other is not branch
                    if other.given_up:
                        task.cancel()

        try:
            async with asyncio.TaskGroup() as group:
                for engine, branch in zip(engines, branches, strict=True):
                    tasks.append(group.create_task(run(engine, branch)))
        except BaseExceptionGroup as failed:  # the group has cancelled and awaited the others
            raise _first(failed) from _first(failed).__cause__
        for branch in branches:
            if branch.given_up and self.record.of(branch)[-1].role == "header":  # it had not even begun
                place, context = self._place(branch), branch.context
                step = interpret(self.dialect, "branch", place, context, (), "cancelled", self.tokenizer)
                self.record.append(branch, step, None)

    async def _run_branch(self, engine: Engine, branch: Strand, new: int) -> None:
        try:
            await self._think(engine, branch, "branch", new)
        except BranchFailed:
            raise
        except EngineError as error:
            where = ".".join(map(str, branch.path))
            raise BranchFailed(f"branch {where}: {error}", branch.path, error.status) from error

    async def _spawn(self, engine: Engine, strand: Strand, outline: Outline) -> int:
        """Start one branch and go on beside it. Its share is set aside until it is joined."""
        if strand.ahead is None or not strand.ahead.running:
            strand.blocks, strand.ahead = strand.blocks + 1, Ahead()
        ahead, returned = strand.ahead, self.dialect.sees == "message"
        share = branch_tokens(
            strand.left, self.overhead, self.plan.width, self.plan.budget.branch_tokens, returned=returned
        )
        ahead.forked += 1
        (forked,) = await self._commit(engine, strand, 1)
        self.ahead.append(forked)
        branch = self._branch(strand, ahead.forked, outline, share, (strand.order[-1],))
        new = len(branch.context) - (0 if returned else len(strand.context))
        task = self.tasks.create_task(self._run_branch(forked, branch, new))
        aside = share * (1 + returned) + self.overhead.branch
        strand.left -= aside
        ahead.running[branch.number] = (branch, task, aside)
        return 0

    async def _join(self, strand: Strand, number: str) -> int:
        """Wait for one branch (its result comes back), or for all of them (they are put behind the wait)."""
        ahead = strand.ahead
        if ahead is None:
            return 0
        returned = self.dialect.sees == "message"
        numbers = [number] if returned else list(ahead.running)
        waited = strand.tip
        tips: list[int] = []
        before = len(strand.context)
        for n in numbers:
            branch, task, aside = ahead.running.pop(n)
            await task
            strand.left += aside
            self._take(strand, branch)
            if returned:
                return self._results(strand, [branch], aside)
            prefix = len(branch.context) - sum(self.record.spans[i].tokens for i in branch.order)
            strand.context += branch.context[prefix:]
            tips += branch.tip
        strand.tip = (*waited, *tips)
        return len(strand.context) - before

    def _take(self, strand: Strand, branch: Strand) -> None:
        strand.order += branch.order
        strand.left -= branch.spent
        strand.spent += branch.spent

    def _drop(self, strand: Strand) -> None:
        """Go on from before the call, which may be in two pieces; it stays in the record."""
        while (span := self.record.spans[strand.tip[0]]).role == "fork":
            strand.tip = span.parents
            strand.context = strand.context[: len(strand.context) - span.tokens]

    def _results(self, strand: Strand, branches: Sequence[Strand], most: int) -> int:
        """Write what branches returned, each behind its own end in time. Returns the new tokens."""
        before = len(strand.context)
        self.record.inject(strand, "lead", self.grammar.written("lead"))
        for branch in branches:
            answer = self._answer(branch, most)
            rule = "failure" if not answer and "failure" in self.grammar.rules else "result"
            text = self.grammar.written(rule, branch.number, answer, branch.outline)
            strand.after = branch.tip
            self.record.inject(
                strand, "result", text, label=answer.strip(), path=branch.path, outline=branch.outline
            )
            strand.after = ()
        self.record.inject(strand, "tail", self.grammar.written("tail"))
        return len(strand.context) - before

    def _answer(self, branch: Strand, most: int) -> str:
        """What a branch says to the one that forked it; nothing if it was cut before it had said it."""
        spans = self.record.of(branch)
        closers = [s for s in spans if s.role == "closer"]
        if self.grammar.ending("body", branch.number):
            text = closers[0].label if closers and all(s.origin == "decoded" for s in closers) else ""
        else:
            body = "".join(s.text for s in spans if s.role == "body" and s.origin == "decoded")
            text = brief(self.dialect.brief).answer(body)
        text = self._shortened(text, most)
        return text if not any(mark in text for mark in self.grammar.marks) else ""

    def _new_rid(self) -> str:
        return f"{self.rid}-{uuid.uuid4().hex[:12]}"
