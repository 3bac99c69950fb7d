"""One trajectory under way: decode the trunk, fork, decode the branches in parallel, join, continue."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from sgl_apr.engine.base import Engine, Load
from sgl_apr.errors import BranchFailed, EngineError
from sgl_apr.formats.dialects import Phase
from sgl_apr.formats.segmenter import Outline
from sgl_apr.runtime import telemetry
from sgl_apr.runtime.activity import Activity
from sgl_apr.runtime.allowance import NO_LIMIT, Allowance
from sgl_apr.runtime.async_branches import AsyncBranches
from sgl_apr.runtime.branch_group import BranchGroup, OuterLease
from sgl_apr.runtime.branch_judge import BranchJudge
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.continuation import PhaseExtension, can_continue
from sgl_apr.runtime.eager_branches import EagerBranches
from sgl_apr.runtime.engine_cleanup import release_engines
from sgl_apr.runtime.events import Delta, OnEvent
from sgl_apr.runtime.fork_join import ForkJoin, apply_template
from sgl_apr.runtime.fork_rules import ForkRules, PhaseLimits
from sgl_apr.runtime.lease_pool import Lease, LeasePool
from sgl_apr.runtime.leases import BranchLeases
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.phase_output import closing_overhead
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.request_runner import MAX_RECOMPUTED_TOKENS, RequestRunner
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.call_loop import CallLoop, CallTurn
from sgl_apr.runtime.tools.rules import CallRules, make_syntax
from sgl_apr.runtime.tools.runner import ToolRunner
from sgl_apr.trajectory.join_layout import Layout
from sgl_apr.trajectory.trajectory import Trajectory

log = logging.getLogger(__name__)


class ReasoningRun:
    """Runs one trajectory. A branch runs the same loop as the trunk.

    Args:
        engine: Decodes.
        options: What was asked for.
        on_event: Is called with every event.
        tasks: Runs branches that continue in parallel with their sequence, and scorers.
        activity: Counts what is in flight.
    """

    def __init__(
        self,
        engine: Engine,
        options: ReasonOptions,
        on_event: OnEvent | None,
        tasks: asyncio.TaskGroup,
        activity: Activity | None = None,
    ) -> None:
        self.engine, self.options, self.dialect = engine, options, options.dialect
        self.tasks = tasks
        self.rid = f"apr-{uuid.uuid4().hex}"
        self.seed = options.seed if options.seed is not None else random.getrandbits(31)
        self.recorder = TrajectoryRecorder(engine.tokenizer, on_event)
        overhead = closing_overhead(self.dialect, engine.tokenizer, options.budget.depth)
        if template := options.branch_prompt_template:
            tokens = len(engine.tokenizer.encode(apply_template(template, ""), add_special_tokens=True))
            overhead = replace(overhead, branch=overhead.branch + tokens)
        self.rules = ForkRules(
            options, overhead, self.recorder.request_log, engine.context,
            shares_tokens=can_continue(engine, options),
        )  # fmt: skip
        self.runner = RequestRunner(engine, options, self.recorder, self.rid, self.seed, activity)
        self.call_loop: CallLoop | None = None
        if syntax := make_syntax(options, engine):
            tools = ToolRunner(options, syntax, self.recorder, activity)
            self.call_loop = CallLoop(
                tools, CallRules(options, syntax, self.recorder.request_log), self.rules
            )
        self.fork_join = ForkJoin(options, self.runner.kv_joiner)
        self.async_branches = AsyncBranches(self.runner, self.rules, self.fork_join, tasks)
        if options.eager_branches:
            self.runner.eager_branches = EagerBranches(
                self.rules, self.fork_join, self.runner.builder, tasks, self.runner.first_seed
            )

    async def run(self, prompt_ids: tuple[int, ...], prompt_layout: Layout = ()) -> Trajectory:
        """Run from the prompt to the end of the trunk.

        Args:
            prompt_ids: The token ids of the prompt.
            prompt_layout: How its beginning is joined in the KV cache.
        """
        seconds = self.options.budget.seconds
        deadline = asyncio.get_running_loop().time() + seconds if seconds is not None else None
        scope = CancelScope(None, deadline, "seconds")
        allowance = self.rules.trunk_allowance(len(prompt_ids))
        trunk = self.recorder.start_trunk(prompt_ids, allowance, scope, prompt_layout)
        try:
            await self._run_sequence(self.engine, trunk, "trunk", len(prompt_ids))
        finally:
            await self.async_branches.release()
        if trunk.blocks < self.options.min_forks:
            acted = ", ".join({hit.limit: None for hit in self.recorder.request_log.limits if not hit.path})
            log.warning(
                "%s: the reply ended with %d of %d required forks; limits that it reached: %s",
                self.rid, trunk.blocks, self.options.min_forks, acted or "none",
            )  # fmt: skip
        return self.recorder.finish(
            trunk,
            self.dialect.name,
            self.seed,
            seeds_honoured=self.runner.supports_seeds,
            tokens_shared=self.rules.shares_tokens,
        )

    async def _run_sequence(
        self,
        engine: Engine | None,
        sequence: SequenceState,
        phase: Phase,
        new: int,
        group: BranchGroup | None = None,
    ) -> None:
        """Decode, fork and join until the sequence ends.

        Args:
            engine: The engine of the sequence, None if it may only be closed.
            sequence: The trunk, or a branch.
            phase: The first phase.
            new: Tokens of its context that the engine has not computed.
            group: The group that it is a branch of.
        """
        next_phase: Phase = "after" if phase == "trunk" else "rejoin"
        if phase == "trunk" and phase not in self.dialect.grammar.rules:  # the reply begins with a fork
            outlines = self.rules.opening_outlines(sequence)
            new, phase = await self._fork_and_join(engine, sequence, outlines, new, group), next_phase
        turn = CallTurn() if self.call_loop else None
        while True:
            caps_width = self.options.cap_width_by_load
            load = await self._load_for_width(engine, sequence) if caps_width else None
            limits = self.rules.phase_limits(sequence, phase, load)
            extend = self._extension(sequence, phase, limits, group) if group else None
            calls = self.call_loop.limits(sequence, limits, turn) if self.call_loop and turn else None
            output, call = await self.runner.decode(engine, sequence, phase, new, limits, extend, calls)
            output = self.rules.checked(output, sequence, limits)
            if self.call_loop and turn and engine and (output.calls or output.cut_call):
                output = self.call_loop.labelled(sequence, output)
                sequence.append_output(output, call)
                new = await self.call_loop.answer(engine, sequence, phase, output, turn, group)
                continue
            sequence.append_output(output, call)
            if self.runner.eager_branches and not output.forked:
                self.runner.eager_branches.stop_unused(sequence, (*sequence.path, sequence.blocks + 1))
            if turn:
                turn.resumed = False
            if phase == next_phase:
                sequence.record_text(output)
            if output.is_final:
                break
            if output.wait is not None:
                new = await self.async_branches.join(sequence, output.wait)
            elif self.dialect.asynchronous:
                new = await self.async_branches.spawn(
                    engine, sequence, output.outlines[0], self._run_branch, group
                )
            else:
                outlines = output.outlines
                if self.dialect.unlabelled_branches:
                    outlines = self.rules.unlabelled_outlines(limits.width)
                new = await self._fork_and_join(engine, sequence, outlines, outer=group)
            phase = next_phase
        await self.async_branches.join_remaining(sequence)

    def _extension(
        self, sequence: SequenceState, phase: Phase, limits: PhaseLimits, group: BranchGroup
    ) -> PhaseExtension | None:
        """What extends the limit of a branch that shares its tokens with others, None if it has a fixed part."""
        if group.leases is None:
            return None
        numbering = self.runner.builder.numbering(sequence)
        return PhaseExtension(
            self.rules, self.fork_join, group, group.leases, sequence, phase, numbering, limits
        )

    async def _load_for_width(self, engine: Engine | None, sequence: SequenceState) -> Load | None:
        """The engine's load, if it is to cap the width of the next fork."""
        if engine is None or sequence.pending_count or not self.rules.may_fork(sequence):
            return None
        return await self.runner.load(engine, sequence)

    async def _fork_and_join(
        self,
        engine: Engine | None,
        sequence: SequenceState,
        outlines: Sequence[Outline],
        new: int | None = None,
        outer: BranchGroup | None = None,
    ) -> int:
        """Run one branch for each outline, and write the join into the sequence.

        Args:
            engine: The engine of the sequence.
            sequence: The sequence that forks.
            outlines: What the branches are to do.
            new: Tokens that the engine has not computed. None for those injected since the last decode.
            outer: The group that the sequence is a branch of.

        Returns:
            Tokens of the sequence that the engine has not computed after the join.
        """
        group = BranchGroup(sequence, outer)
        identities, size = self.fork_join.announce(group, outlines), len(outlines)
        self.fork_join.open(sequence)
        if new is not None:
            new += sequence.uncached_tokens
        engines, load = (
            await self.runner.fork(engine, sequence, size, new, MAX_RECOMPUTED_TOKENS)
            if engine
            else ((), None)
        )
        share, scope = self.rules.branch_allowance(sequence, size), self.fork_join.scope(sequence)
        sequence.set_aside(share, size)
        pool = self._lease_pool(group, size)
        max_prompt_tokens = pool.max_prompt_tokens(size, share.tokens) if pool else None
        for identity in identities:
            self.fork_join.start(group, identity, share, scope, max_prompt_tokens)
        if pool:
            self._open_leases(group, pool, share)
        engine_of: dict[SequenceState, Engine] = dict(zip(group.branches, engines, strict=False))

        judge = self._judge(group)

        async def commit(branch: SequenceState) -> None:
            await self.runner.commit(engine_of[branch], sequence, branch)

        try:
            await group.run(
                lambda branch: self._run_branch(engine_of.get(branch), group, branch),
                policy=self.options.effective_policy,
                parallelism=self.runner.choose_parallelism(sequence, size, share.tokens, load),
                after_branch=commit if engines and self.options.join == "kv" else None,
            )
        finally:
            scope.detach()
            if judge:
                judge.stop()
            if self.runner.eager_branches:
                self.runner.eager_branches.stop_unused(sequence, group.block)
            await release_engines(engines)
        if isinstance(group.leases, BranchLeases):
            sequence.allowance.refund(calls=group.leases.spare_calls)
        for branch, max_tokens in zip(
            group.branches, self.fork_join.max_result_tokens(group, share), strict=True
        ):
            sequence.record_branch(branch, self.fork_join.final_tokens(branch, max_tokens))
        uncached = self.fork_join.join(group, share)
        group.joined()
        return uncached

    def _judge(self, group: BranchGroup) -> BranchJudge | None:
        """What ends weak branches of a group, if the options ask for that."""
        if not self.options.scoring:
            return None
        before = self.engine.tokenizer.decode(group.parent.context)
        judge = BranchJudge(self.tasks, self.options.scoring, before, len(group.branches))
        self.runner.judges |= dict.fromkeys(group.branches, judge)
        return judge

    def _lease_pool(self, group: BranchGroup, size: int) -> LeasePool | None:
        """What the branches of a group share, if their requests can continue where their limit cut them."""
        if not self.rules.shares_tokens:
            return None
        outer = group.outer
        leases = outer.leases if outer else None
        source = None
        if outer and isinstance(leases, BranchLeases):
            source = OuterLease(outer, leases, group.parent, partial(self.rules.unreserved, group.parent))
        return self.rules.lease_pool(group.parent, size, source)

    def _open_leases(self, group: BranchGroup, pool: LeasePool, share: Allowance) -> None:
        """Replace the equal shares of branches by leases."""
        prompts = [share.tokens - branch.allowance.tokens for branch in group.branches]
        max_tokens = [self.options.budget.branch_tokens or NO_LIMIT] * len(prompts)
        for branch, lease in zip(group.branches, pool.open(prompts, share.tokens, max_tokens), strict=True):
            branch.extend(lease.tokens - share.tokens)

        def final_tokens(branch: SequenceState, lease: Lease) -> int:
            return self.fork_join.final_tokens(branch, min(lease.result_tokens, lease.path_result_tokens))

        group.leases = BranchLeases(pool, group.branches, final_tokens, path_start=group.parent.critical_path)

    async def _run_branch(self, engine: Engine | None, group: BranchGroup, branch: SequenceState) -> None:
        """Run one branch to its end. With on_branch_failure="retry" it restarts once when the engine fails it.

        Raises:
            BranchFailed: The engine failed the branch for good.
        """
        checkpoint = branch.checkpoint() if self.options.on_branch_failure == "retry" else None
        new = len(branch.context) - branch.prefix_tokens
        if branch.prefix_tokens:
            new += group.parent.uncommitted_tokens
        run = partial(self._run_sequence, engine, branch, "branch", new, group)
        try:
            await run()
        except EngineError as error:
            if checkpoint is None and isinstance(error, BranchFailed):  # one of its own branches
                raise
            if checkpoint is None:
                raise BranchFailed(f"branch {branch.identity}: {error}", branch.path, error.status) from error
            log.warning("%s: branch %s failed, and restarts: %s", self.rid, branch.identity, error)
            events = self.recorder.events
            events.retract_text(branch.path, None)
            branch.restart(checkpoint)
            branch.tolerate_failure = True
            if branch.spans:  # a dialect without a header begins with nothing
                events.emit(Delta(branch.path, branch.spans[0].text))
            await run()
        branch.scope.detach()
        if judge := self.runner.judges.get(branch):
            judge.note_ended(branch, complete=branch.finish not in ("aborted", "timeout", "failed"))
        group.end(branch)

    def report(self, error: BaseException | None) -> None:
        """Write the outcome to the log, and to OpenTelemetry if it is installed."""
        requests = self.recorder.request_log
        tokens = sum(s.tokens for s in self.recorder.graph.spans if s.origin != "prompt")
        outcome = repr(error) if error else "done"
        log.info("%s: %s, %d tokens in %d calls", self.rid, outcome, tokens, len(requests.calls))
        telemetry.export(
            self.dialect.name,
            requests.calls,
            requests.seconds,
            tool_calls=requests.tool_calls,
            attributes={"apr.rid": self.rid, "apr.tokens": tokens},
            error=error,
        )
