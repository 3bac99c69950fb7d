"""What programs of a fixed structure are written in: thoughts that follow a prompt or one another, in one trajectory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sgl_apr.engine.base import Engine
from sgl_apr.errors import BudgetExceeded
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.requests import Requests
from sgl_apr.runtime.branches import first_error
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.cancel_scope import CancelScope, ScopeCancelled
from sgl_apr.runtime.events import BranchEnded, Forked, Joined, OnEvent
from sgl_apr.runtime.join_policy import Policy, stop_condition
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.blocks import outcome
from sgl_apr.trajectory.trajectory import Trajectory

T = TypeVar("T")
BranchStart = tuple[
    tuple[int, ...], tuple[int, ...], tuple[int, ...], Prompt
]  # context, tip, after, and what is asked


class MethodSession:
    """One run of a method under one budget: what is asked together runs at once behind one committed prefix.

    Options are those of `areason` that concern requests (retry, failed, pacing, seed, logprobs, temperature, ...).
    A budget's `width` limits what runs at once, `branch_tokens` what one thought may decode; its depth, blocks and
    outlines are for models that fork by themselves. Use `thinking`, which cleans up.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: str | Sequence[int],
        method: str,
        *,
        budget: Budget | None = None,
        on_event: OnEvent | None = None,
        **options: Any,
    ) -> None:
        self.method = method
        self.requests = Requests(engine, budget, on_event, options)
        self.record, self.budget = self.requests.record, self.requests.budget
        self._within = dict[
            int, list[tuple[int, SequenceState]]
        ]()  # branches of sequences, and before which of their spans
        tokenizer = engine.tokenizer
        ids = tuple(tokenizer.encode(prompt, first=True)) if isinstance(prompt, str) else tuple(prompt)
        if engine.context is not None and len(ids) >= engine.context:
            raise BudgetExceeded(
                f"the prompt has {len(ids)} tokens, expected fewer than the {engine.context} of the engine's context"
            )
        seconds = self.budget.seconds
        deadline = asyncio.get_running_loop().time() + seconds if seconds is not None else None
        self.root = Completion(
            self.record.trunk(ids, self.requests.allowance, CancelScope(None, deadline, "seconds")), engine
        )

    async def continue_from(self, thought: Completion, ask: Prompt | str = "") -> Completion:
        """Let a thought go on: it is asked in its own context."""
        ask = self._ask(ask)
        thought.sequence.waits_for = self._tips(ask.depends_on) if ask.depends_on else ()
        self.requests.write(thought.sequence, ask.text)
        (tokens,) = self.requests.reserve([ask])
        return await self.requests.decode(thought.engine, thought.sequence, ask, tokens)

    async def fork(
        self, thought: Completion, asks: Sequence[Prompt | str], *, of: float = 1.0, policy: Policy = "all"
    ) -> list[Completion]:
        """Thoughts that follow one, at once, each in a context of its own behind it; in their order.

        `of` is the share of what is left of the budget that they may take. Those that `policy` cuts are there too,
        as they were, and those that failed, with no text.
        """
        sequence = thought.sequence
        begun = self._begin(
            sequence, [(sequence.context, sequence.frontier, (), self._ask(ask)) for ask in asks]
        )
        return await self._run(thought, begun, of, policy)

    async def sample_independent(
        self,
        asks: Sequence[Prompt | str],
        *,
        of: float = 1.0,
        policy: Policy = "all",
        at: Completion | None = None,
    ) -> list[Completion]:
        """Thoughts that see nothing but what each is asked, at once. `at`: the thought that goes on behind them."""
        at = at or self.root
        return await self._run(at, self._begin(at.sequence, self._apart(asks)), of, policy)

    async def prefill(
        self, asks: Sequence[Prompt | str], *, at: Completion | None = None
    ) -> list[Completion]:
        """Contexts of their own with what each is asked, behind which nothing is decoded yet: to go on there."""
        at = at or self.root
        begun = self._begin(at.sequence, self._apart(asks))
        engines, _ = await self.requests.forks(at, [branch for branch, _ in begun], 0)
        opened = [Completion(branch, engines[k] if engines else None) for k, (branch, _) in enumerate(begun)]
        self._joined(begun, opened)
        return opened

    async def samples(self, asks: Sequence[Prompt], n: int, *, of: float = 1.0) -> list[list[Completion]]:
        """`n` thoughts behind each of several contexts of their own, all at once; by context, in their order."""
        opened = await self.prefill(asks)
        share = int(self.requests.left * of) // max(1, len(asks) * n)

        def behind(one: Completion, ask: Prompt) -> Coroutine[Any, Any, list[Completion]]:
            sequence = one.sequence
            begun = self._begin(sequence, [(sequence.context, sequence.frontier, (), ask.without_text)] * n)
            return self._run(one, begun, 1.0, "all", share)

        return await gather([behind(one, ask) for one, ask in zip(opened, asks, strict=True)])

    async def sample_with_context(
        self, contexts: Sequence[tuple[str, Sequence[Completion], Prompt]], *, of: float = 1.0
    ) -> list[Completion]:
        """Thoughts behind any text, at once, each with the thoughts that the text shows, whose copies are not counted."""
        found = [
            (tuple(self.requests.tokenizer.encode(text, first=True)), self._tips(shown), (), ask)
            for text, shown, ask in contexts
        ]
        return await self._run(self.root, self._begin(self.root.sequence, found), of, "all")

    async def run_until_deadline(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What something else than the engine comes to; None if the time is up before."""
        try:
            return await self.root.sequence.scope.run(work)
        except ScopeCancelled:
            return None

    def affordable_width(self, wanted: int, need: int = 1, of: float = 1.0, calls: int = 1) -> int:
        """How many of so many wanted thoughts the budget bears, if each is to get so many tokens and calls; at least one."""
        bears = [wanted, max(1, int(self.requests.left * of) // max(1, need))]
        limits = ["", "tokens"]
        if self.budget.width is not None:
            bears.append(self.budget.width)
            limits.append("width")
        if self.budget.calls is not None:
            bears.append(max(1, (self.requests.allowance.calls - 1) // calls))
            limits.append("calls")
        least = min(bears)
        if least < wanted:
            self.record.record_limit(limits[bears.index(least)], self.root.sequence)
        return least

    def finish(self) -> Trajectory:
        """All that was thought; the last thing to be asked for."""
        sequence = self.root.sequence
        sequence.span_order = list(self._order(sequence))
        return self.record.finish(
            sequence, self.method, self.requests.seed, self.requests.decoder.supports_seeds
        )

    def _ask(self, ask: Prompt | str) -> Prompt:
        return Prompt(ask) if isinstance(ask, str) else ask

    def _tips(self, thoughts: Sequence[Completion]) -> tuple[int, ...]:
        return tuple(
            dict.fromkeys(t for thought in thoughts or [self.root] for t in thought.sequence.frontier)
        )

    def _apart(self, asks: Sequence[Prompt | str]) -> list[BranchStart]:
        return [((), (), self._tips(ask.depends_on), ask) for ask in map(self._ask, asks)]

    def _order(self, sequence: SequenceState) -> Sequence[int]:
        """The spans of a sequence with those of its branches where they were forked: parents come first."""
        inside, found, at = self._within.get(id(sequence), []), list[int](), 0
        for before, branch in inside:
            found += sequence.span_order[at:before]
            found += self._order(branch)
            at = before
        return [*found, *sequence.span_order[at:]]

    def _begin(
        self, sequence: SequenceState, begun: Sequence[BranchStart]
    ) -> list[tuple[SequenceState, Prompt]]:
        """The branches of a fork of `sequence`, with what each is asked."""
        if not begun:
            return []
        sequence.blocks += 1
        block = (*sequence.path, sequence.blocks)
        self.record.emit(Forked(block, tuple((f"{k}", ask.name) for k, (*_, ask) in enumerate(begun, 1))))
        outer, branches = CancelScope(sequence.scope), list[tuple[SequenceState, Prompt]]()
        for k, (context, tip, after, ask) in enumerate(begun, 1):
            branch = SequenceState(
                (*block, k), context, tip, self.requests.allowance, CancelScope(outer), number=f"{k}", outline=ask.name, waits_for=after,
                tolerate_failure=self.requests.plan.on_branch_failure != "raise",
            )  # fmt: skip
            self._within.setdefault(id(sequence), []).append((len(sequence.span_order), branch))
            self.requests.write(branch, ask.text)
            branch.waits_for = () if branch.span_order else after
            branches.append((branch, ask))
        return branches

    async def _run(
        self,
        thought: Completion,
        begun: Sequence[tuple[SequenceState, Prompt]],
        of: float,
        policy: Policy,
        most: int | None = None,
    ) -> list[Completion]:
        """Let branches decode, at once or as paced, until enough of them have ended; the others are cut."""
        if not begun:
            return []
        tokens = self.requests.reserve([ask for _, ask in begun], of, most)
        engines, at_once = await self.requests.forks(thought, [branch for branch, _ in begun], max(tokens))
        gate, ended, done = asyncio.Semaphore(at_once), list[Completion](), stop_condition(policy, len(begun))

        async def run(k: int, branch: SequenceState, ask: Prompt) -> Completion:
            async with gate:
                found = await self.requests.decode(engines[k] if engines else None, branch, ask, tokens[k])
            if found.finish != "failed":
                ended.append(found)
            if len(ended) < len(begun) and done([self.record.branch(t.sequence) for t in ended]):
                for other, _ in begun:
                    if all(t.sequence is not other for t in ended):
                        other.scope.cancel("aborted", "policy")
            return found

        found = await gather(run(k, branch, ask) for k, (branch, ask) in enumerate(begun))
        self._joined(begun, found)
        return found

    def _joined(self, begun: Sequence[tuple[SequenceState, Prompt]], found: Sequence[Completion]) -> None:
        for thought in found:
            self.record.emit(BranchEnded(thought.sequence.path, outcome(thought.finish) or "ok"))
        if begun:
            block = begun[0][0].path[:-1]
            self.record.emit(Joined(block, tuple(branch.path[-1] for branch, _ in begun)))


async def gather(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What several come to that run at once; the first failure cancels the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:  # the group has cancelled and awaited the others
        raise first_error(failed) from first_error(failed).__cause__
    return [task.result() for task in tasks]


@asynccontextmanager
async def method_session(
    engine: Engine,
    prompt: str | Sequence[int],
    method: str,
    **options: Any,
) -> AsyncIterator[MethodSession]:
    """Thoughts whose requests are aborted if anything fails, and whose forks are given back."""
    run = MethodSession(engine, prompt, method, **options)
    try:
        yield run
    except BaseException:
        await asyncio.shield(engine.abort(run.requests.rid))
        raise
    finally:
        await run.requests.release()
