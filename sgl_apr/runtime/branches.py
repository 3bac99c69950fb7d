"""The branches of one fork: begun from their shares, run at once or as paced, cut when enough have ended, joined."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from sgl_apr.engine.base import Engine
from sgl_apr.errors import BranchFailed, EngineError
from sgl_apr.formats.dialects import Phase
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime.allocation import Allowance, BudgetAllocator
from sgl_apr.runtime.cancel_scope import CancelScope, ScopeCancelled
from sgl_apr.runtime.decoder import RequestRunner
from sgl_apr.runtime.events import BranchEnded, Delta, Forked, Joined
from sgl_apr.runtime.join_policy import deadline_seconds, stop_condition
from sgl_apr.runtime.message_join import make_branch_prompt, remove_call_from_context, write_results
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.blocks import outcome

Think = Callable[[Engine | None, SequenceState, Phase, int], Awaitable[None]]
log = logging.getLogger(__name__)


class Branches:
    """Forks and joins of one trajectory. `think` lets a sequence go on until it ends."""

    def __init__(self, decoder: RequestRunner, allocator: BudgetAllocator, think: Think) -> None:
        self.decoder, self.allocator, self._think = decoder, allocator, think
        self.plan, self.record = decoder.plan, decoder.record
        self.dialect, self.grammar = self.plan.dialect, self.plan.dialect.grammar
        self.returned, self.retry_failed_branch = (
            self.dialect.branch_context == "message",
            self.plan.on_branch_failure == "retry",
        )
        self.kv = self.plan.join == "kv"

    async def fork_and_join(
        self,
        engine: Engine | None,
        sequence: SequenceState,
        outlines: Sequence[Outline],
        new: int | None = None,
    ) -> int:
        """Run one branch per outline, and leave in the sequence what comes of them. Returns its new tokens.

        `new` tokens of it are unknown to the engine yet, None: those injected last alone.
        """
        sequence.blocks += 1
        sequence.allowance.blocks -= 1
        block, fork, size = (*sequence.path, sequence.blocks), sequence.span_order[-1], len(outlines)
        self.record.emit(Forked(block, tuple((self.number(o, k), o.text) for k, o in enumerate(outlines))))
        if self.dialect.removes_call_from_context:
            remove_call_from_context(self.record, sequence)
        else:
            self.record.inject(sequence, "lead", self.grammar.render_rule("lead"))
            new = new if new is None else new + self.record.uncached_tokens(sequence)
        engines, load = await self.decoder.fork(engine, sequence, size, new) if engine else ((), None)
        share = self.allocator.branch_allowance(
            sequence.allowance, self.record.critical_path_to(sequence), size
        )
        sequence.allowance.calls -= size * share.calls
        sequence.allowance.blocks -= size * share.blocks
        scope = self.scope(sequence)
        branches = [self.start_branch(sequence, k, o, share, (fork,), scope) for k, o in enumerate(outlines)]
        prefix = 0 if self.returned else len(sequence.context)
        try:
            at_once = self.decoder.choose_parallelism(sequence, size, share.tokens, load)
            await self._run(sequence, engines, branches, prefix, at_once)
        finally:
            scope.detach()
            for forked in engines:
                await forked.release()
        for branch in branches:
            self.record.merge_branch(sequence, branch)
        joined = Joined(block, tuple(b.path[-1] for b in branches))
        if self.returned:
            most = min(share.tokens, share.critical_path_cap)
            written = write_results(self.record, self.dialect, sequence, branches, most)
            self.record.emit(joined)
            return written
        in_cache = self.kv and self.decoder.kv_joiner.join(sequence, prefix, branches)
        sequence.frontier = tuple(tip for b in branches for tip in b.frontier)
        for branch in branches:
            sequence.context += branch.context[prefix:]
        before = len(sequence.context)
        self.record.inject(sequence, "tail", self.grammar.render_rule("tail"))
        self.record.emit(joined)
        unknown = 0 if in_cache else sum(self.record.uncached_tokens(branch) for branch in branches)
        return len(sequence.context) - before + unknown

    def number(self, outline: Outline, k: int) -> str:
        """The number of branch `k` (from 0) of a fork, as its header has it."""
        return outline.number or str(self.dialect.first_number + k)

    def scope(self, sequence: SequenceState) -> CancelScope:
        """How long the branches of a fork may run: they leave its reserve of time to the sequence."""
        left, own, now = (
            sequence.scope.remaining_seconds(),
            deadline_seconds(self.plan.effective_policy),
            asyncio.get_running_loop().time(),
        )
        ends = (
            [(now + left * (1 - self.plan.budget.reserve), sequence.scope.limit)] if left is not None else []
        )
        ends += [(now + own, "policy")] if own is not None else []
        deadline, limit = min(ends, default=(None, ""))
        return CancelScope(sequence.scope, deadline, limit)

    def start_branch(
        self,
        sequence: SequenceState,
        k: int,
        outline: Outline,
        share: Allowance,
        after: tuple[int, ...],
        outer: CancelScope,
    ) -> SequenceState:
        """A branch with its header, or with its message in a context of its own."""
        number, path = self.number(outline, k), (*sequence.path, sequence.blocks, k + 1)
        sees = (sequence.context, sequence.frontier) if not self.returned else ((), ())
        reach = self.record.critical_path_to(sequence)
        branch = SequenceState(
            path, *sees, replace(share), CancelScope(outer), number=number, outline=outline.text,
            tolerate_failure=self.plan.on_branch_failure == "skip", kv_layout=sequence.kv_layout,
        )  # fmt: skip
        if self.returned:  # what it is told comes out of its share
            branch.waits_for = after
            message = make_branch_prompt(
                self.record, self.dialect, sequence, outline.text, min(share.tokens, share.critical_path_cap)
            )
            text = self.plan.branch_prompt_template(message) if self.plan.branch_prompt_template else message
        else:
            text = self.grammar.render_rule("header", number)
        self.record.inject(branch, "header", text, label=outline.text)
        if not self.returned:
            branch.allowance.tokens, reach = share.tokens, self.record.critical_path_to(branch)
        branch.allowance.critical_path_cap, branch.waits_for = reach + share.critical_path_cap, ()
        return branch

    async def _run(
        self,
        sequence: SequenceState,
        engines: Sequence[Engine],
        branches: Sequence[SequenceState],
        prefix: int,
        at_once: int,
    ) -> None:
        """Until enough of them have ended; the others are cut where they are."""
        done, ended = stop_condition(self.plan.effective_policy, len(branches)), list[SequenceState]()
        gate = asyncio.Semaphore(at_once)

        async def run(engine: Engine | None, branch: SequenceState) -> None:
            await think(engine, branch)
            if engine and self.kv:  # while others still run
                await self.decoder.commit(engine, sequence, branch)

        async def think(engine: Engine | None, branch: SequenceState) -> None:
            try:
                await branch.scope.run(gate.acquire())
            except ScopeCancelled:
                await self.run(engine, branch, 0)  # it closes what is open
                return
            try:
                await self.run(engine, branch, len(branch.context) - prefix)
            finally:
                gate.release()
            ended.append(branch)
            if len(ended) < len(branches) and done([self.record.branch(b) for b in ended]):
                for other in branches:
                    if other not in ended:
                        other.scope.cancel("aborted", "policy")

        try:
            async with asyncio.TaskGroup() as group:
                for k, branch in enumerate(branches):
                    group.create_task(run(engines[k] if engines else None, branch))
        except BaseExceptionGroup as failed:  # the group has cancelled and awaited the others
            raise first_error(failed) from first_error(failed).__cause__

    async def run(self, engine: Engine | None, branch: SequenceState, new: int) -> None:
        """One branch to its end. Where it fails for good it begins anew once, or raises `BranchFailed`."""
        begun = (
            replace(branch, span_order=[*branch.span_order], allowance=replace(branch.allowance))
            if self.retry_failed_branch
            else None
        )
        try:
            await self._think(engine, branch, "branch", new)
        except EngineError as error:
            if begun is None and isinstance(error, BranchFailed):  # of its own branches
                raise
            if begun is None:
                raise BranchFailed(f"branch {branch.name}: {error}", branch.path, error.status) from error
            log.warning("%s: branch %s failed, and begins anew: %s", self.decoder.rid, branch.name, error)
            self.record.retract_text(branch, None)
            calls = branch.allowance.calls
            for field in (
                "context",
                "frontier",
                "span_order",
                "allowance",
                "blocks",
                "tokens_used",
                "kv_layout",
            ):
                setattr(branch, field, getattr(begun, field))
            branch.allowance.calls, branch.tolerate_failure = calls, True
            self.record.emit(Delta(branch.path, self.record.spans_of(branch)[0].text))
            await self._think(engine, branch, "branch", new)
        branch.scope.detach()
        self.record.emit(BranchEnded(branch.path, outcome(self.record.finish_reason_of(branch)) or "ok"))


def first_error(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """What failed first; a group cancels and awaits its other tasks before it raises."""
    error = failed.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error
