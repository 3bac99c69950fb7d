"""The one loop: decode the trunk, fork, decode the branches at once, join, go on; over any engine."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sgl_apr.budget import branch_tokens, lead_chars, trunk_tokens
from sgl_apr.dialects import Dialect
from sgl_apr.engine.base import Engine, Request, Result
from sgl_apr.errors import (
    BranchFailed,
    BudgetExceeded,
    EngineError,
    EngineTimeout,
)
from sgl_apr.lowering import Fork
from sgl_apr.runtime.plan import Plan, plan
from sgl_apr.runtime.steps import Phase, Step, interpret, overhead
from sgl_apr.runtime.stream import TextStream
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory import Call, Finish, Path, Span, Trajectory

OnText = Callable[[Path, str], None]


async def areason(
    engine: Engine,
    prompt: str | Sequence[int],
    dialect: Dialect | str = "threadweaver",
    *,
    on_text: OnText | None = None,
    **options: Any,
) -> Trajectory:
    """Let the model behind `engine` answer `prompt` (text, or ids that are sent as they are).

    Options are the fields of `Plan`; any other is a sampling parameter (temperature, ...).
    `on_text(path, text)` hears every piece of text as it is written, decoded or injected.
    Raises an `EngineError` when the engine fails, with every other request of the trajectory
    aborted, and `BudgetExceeded` for a budget in which nothing fits.
    """
    tokenizer = engine.tokenizer
    ids = tuple(tokenizer.encode(prompt, first=True)) if isinstance(prompt, str) else tuple(prompt)
    return await run_plan(engine, ids, plan(dialect, **options), on_text)


def run(
    url: str,
    prompt: str | Sequence[int],
    dialect: Dialect | str = "threadweaver",
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
    run = _Run(engine.tokenizer, plan, on_text or (lambda path, text: None))
    try:
        async with asyncio.timeout(plan.budget.seconds):
            return await run.trajectory(engine, prompt_ids)
    except TimeoutError:
        await engine.abort(run.rid)
        raise EngineTimeout(
            f"the trajectory took longer than its budget of {plan.budget.seconds} s"
        ) from None
    except BaseException:  # a failure or a cancellation: nothing of this trajectory goes on decoding
        await asyncio.shield(engine.abort(run.rid))
        raise


@dataclass
class _Strand:
    """One line of thought as it grows: the trunk, or a branch. `order` lists its spans as they stand in the text."""

    path: Path
    context: tuple[int, ...]
    tip: tuple[int, ...]
    order: list[int] = field(default_factory=list)
    blocks: int = 0


class _Run:
    """One trajectory under way: the spans and calls so far, and what is left of the budget."""

    def __init__(self, tokenizer: Tokenizer, plan: Plan, on_text: OnText) -> None:
        self.tokenizer, self.plan, self.on_text = tokenizer, plan, on_text
        self.rid = f"apr-{uuid.uuid4().hex}"
        self.began = time.monotonic()
        self.spans: list[Span] = []
        self.calls: list[Call] = []
        self.left = plan.budget.tokens
        self.overhead = overhead(plan.dialect, tokenizer)

    async def trajectory(self, engine: Engine, prompt_ids: tuple[int, ...]) -> Trajectory:
        text = self.tokenizer.decode(prompt_ids)
        prompt = self._add(Span("prompt", "prompt", text, prompt_ids, ()))
        trunk = _Strand((), prompt_ids, (prompt,), [prompt])
        await self._think(engine, trunk, "trunk", new=len(prompt_ids))
        place = {old: new for new, old in enumerate(trunk.order)}
        spans = tuple(
            replace(self.spans[i], parents=tuple(place[p] for p in self.spans[i].parents))
            for i in trunk.order
        )
        return Trajectory(spans, self.plan.dialect.name, tuple(self.calls), time.monotonic() - self.began)

    async def _think(
        self, engine: Engine, strand: _Strand, phase: Phase, new: int, limit: int | None = None
    ) -> None:
        """Decode and fork until the strand ends; `new` prompt tokens are unknown to the engine yet."""
        while True:
            width, fork = self._fork_rule(strand, phase)
            tokens = limit if limit is not None else trunk_tokens(self.left, self.overhead, width)
            step, call = await self._decode(engine, strand, phase, new, tokens, width, fork)
            self._append(strand, step, call)
            if limit is None:
                self.left -= len(step.token_ids)
            if not step.outlines:
                return
            new = await self._fork_and_join(engine, strand, step.outlines)
            phase = "after"

    def _fork_rule(self, strand: _Strand, phase: Phase) -> tuple[int, Fork]:
        """How wide the next fork may be, and whether it has to come, may come, or may not (width 0)."""
        plan = self.plan
        if phase == "body":
            return 0, "forbidden"
        required = strand.blocks < plan.min_blocks
        allowed = plan.max_blocks is None or strand.blocks < plan.max_blocks
        # A fork is worth having only if at least half of what is left is not spent on its tags.
        fits = [
            w
            for w in range(plan.budget.width, plan.min_width - 1, -1)
            if 2 * self.overhead.of(w) <= self.left
        ]
        if required and not fits:
            need = 2 * self.overhead.of(plan.min_width)
            raise BudgetExceeded(
                f"a fork needs at least {need} tokens here, and {self.left} are left of {plan.budget}"
            )
        if not allowed or not fits:
            return 0, "forbidden"
        return fits[0], "required" if required else "auto"

    async def _decode(
        self, engine: Engine, strand: _Strand, phase: Phase, new: int, tokens: int, width: int, fork: Fork
    ) -> tuple[Step, int | None]:
        """One request and what it means; no request if there is nothing left to decode."""
        dialect, context = self.plan.dialect, strand.context
        result, call = Result((), "length", 0, 0), None
        if tokens > 0:
            request = self._request(context, phase, tokens, width, fork)
            stream = TextStream(self.tokenizer, context, lambda text: self.on_text(strand.path, text))
            started = time.monotonic()
            result = await engine.decode(request, stream)
            call = self._record(phase, strand.path, result, new, started)
        step = interpret(dialect, phase, context, result.token_ids, result.finish == "length", self.tokenizer)
        if tokens > 0:
            stream.finish(step)
        else:
            self.on_text(strand.path, "".join(p.text for p in step.pieces))
        return step, call

    def _request(
        self, context: tuple[int, ...], phase: Phase, tokens: int, width: int, fork: Fork
    ) -> Request:
        dialect, grammar = self.plan.dialect, None
        if self.plan.constrain:
            grammar = dialect.llguidance(
                phase,
                self.tokenizer,
                width=max(width, self.plan.min_width),
                min_width=self.plan.min_width,
                fork="auto" if phase == "body" else fork,
                lead_chars=lead_chars(tokens) if fork == "required" else None,
                outline_chars=self.plan.budget.outline_chars,
                plain=self.plan.plain,
            )
        stops = [] if fork == "forbidden" and phase != "body" else [dialect.stop(phase)]
        special = [self.tokenizer.special(tag) for tag in stops]
        return Request(
            rid=f"{self.rid}-{uuid.uuid4().hex[:12]}",
            input_ids=context,
            max_tokens=tokens,
            sampling=self.plan.sampling,
            grammar=grammar,
            stop_ids=tuple(i for i in special if i is not None),
            stop=tuple(t for t, i in zip(stops, special, strict=True) if i is None),
        )

    async def _fork_and_join(
        self, engine: Engine, strand: _Strand, outlines: Sequence[tuple[int, str]]
    ) -> int:
        """Run one branch per outline at once, and leave their text in the strand. Returns its new tokens."""
        grammar, budget = self.plan.dialect.grammar, self.plan.budget
        strand.blocks += 1
        self._inject(strand, "lead", grammar.written("lead"))
        share = branch_tokens(self.left, self.overhead, len(outlines), budget.branch_tokens)
        started = time.monotonic()
        committed, engines = await engine.fork(
            f"{self.rid}-{uuid.uuid4().hex[:12]}", strand.context, len(outlines)
        )
        self._record("commit", strand.path, committed, len(strand.context) - self._known(strand), started)
        branches = []
        for number, outline in outlines:
            branch = _Strand((*strand.path, strand.blocks, number), strand.context, strand.tip)
            self._inject(branch, "header", grammar.written("header", number), label=outline)
            branches.append(branch)
        try:
            await self._run_branches(engines, branches, len(strand.context), share)
        finally:
            for forked in engines:
                await forked.release()
        prefix = len(strand.context)
        strand.tip = tuple(tip for b in branches for tip in b.tip)
        for branch in branches:
            strand.order += branch.order
            strand.context += branch.context[prefix:]
            self.left -= len(branch.context) - prefix
        self._inject(strand, "tail", grammar.written("tail"))
        written = [strand.tip[0], *(i for b in branches for i in b.order[1:])]
        return sum(self.spans[i].tokens for i in written if self.spans[i].origin == "injected")

    async def _run_branches(
        self, engines: Sequence[Engine], branches: Sequence[_Strand], prefix: int, share: int
    ) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for engine, branch in zip(engines, branches, strict=True):
                    group.create_task(self._branch(engine, branch, len(branch.context) - prefix, share))
        except BaseExceptionGroup as failed:  # the group has cancelled and awaited the others
            raise failed.exceptions[0] from failed.exceptions[0].__cause__

    async def _branch(self, engine: Engine, branch: _Strand, new: int, share: int) -> None:
        try:
            await self._think(engine, branch, "body", new, limit=share)
        except EngineError as error:
            where = ".".join(map(str, branch.path))
            raise BranchFailed(f"branch {where}: {error}", branch.path, error.status) from error

    def _known(self, strand: _Strand) -> int:
        """How much of the strand the engine has computed: all but what was injected since its last decode."""
        injected = 0
        for i in reversed(strand.order):
            if self.spans[i].origin != "injected":
                break
            injected += self.spans[i].tokens
        return len(strand.context) - injected

    def _inject(
        self, strand: _Strand, role: Literal["lead", "header", "tail"], text: str, label: str = ""
    ) -> None:
        ids = tuple(self.tokenizer.encode(text))
        self._grow(strand, Span(role, "injected", text, ids, strand.tip, strand.path, label))
        if not strand.path:
            self.left -= len(ids)
        self.on_text(strand.path, text)

    def _append(self, strand: _Strand, step: Step, call: int | None) -> None:
        for i, piece in enumerate(step.pieces):
            finish: Finish | None = step.finish if i == len(step.pieces) - 1 else None
            span = Span(
                piece.role, piece.origin, piece.text, piece.token_ids, strand.tip, strand.path, piece.label, finish,
                call if piece.origin == "decoded" else None,
            )  # fmt: skip
            self._grow(strand, span)

    def _grow(self, strand: _Strand, span: Span) -> None:
        index = self._add(span)
        strand.order.append(index)
        strand.tip = (index,)
        strand.context += span.token_ids or ()

    def _add(self, span: Span) -> int:
        self.spans.append(span)
        return len(self.spans) - 1

    def _record(self, phase: str, path: Path, result: Result, new: int, started: float) -> int:
        self.calls.append(
            Call(
                phase=phase,
                path=path,
                prompt_tokens=result.prompt_tokens,
                cached_tokens=result.cached_tokens,
                new_tokens=new,
                output_tokens=len(result.token_ids),
                started=started - self.began,
                ended=time.monotonic() - self.began,
            )
        )
        return len(self.calls) - 1
