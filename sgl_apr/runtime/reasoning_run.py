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
from sgl_apr.runtime.allocation import BudgetAllocator
from sgl_apr.runtime.async_branches import AsyncBranches
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.branches import BranchStarter
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.decoder import RequestRunner
from sgl_apr.runtime.events import Delta, OnEvent
from sgl_apr.runtime.fork_rules import ForkRules
from sgl_apr.runtime.message_join import write_results
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.pacing import Demand
from sgl_apr.runtime.phase_output import closing_overhead
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.trajectory import Trajectory

log = logging.getLogger(__name__)


class ReasoningRun:
    """Runs one trajectory. A branch runs the same loop as the trunk.

    Args:
        engine: Decodes.
        options: What was asked for.
        on_event: Is called with every event.
        tasks: Runs branches that continue beside their sequence.
    """

    def __init__(
        self, engine: Engine, options: ReasonOptions, on_event: OnEvent | None, tasks: asyncio.TaskGroup
    ) -> None:
        self.engine, self.options, self.dialect = engine, options, options.dialect
        self.rid = f"apr-{uuid.uuid4().hex}"
        self.seed = options.seed if options.seed is not None else random.getrandbits(31)
        self.recorder = TrajectoryRecorder(engine.tokenizer, on_event)
        overhead = closing_overhead(self.dialect, engine.tokenizer)
        if template := options.branch_prompt_template:
            tokens = len(engine.tokenizer.encode(template(""), add_special_tokens=True))
            overhead = replace(overhead, branch=overhead.branch + tokens)
        self.by_message = self.dialect.branch_context == "message"
        self.allocator = BudgetAllocator(options.budget, overhead, self.by_message, options.join == "kv")
        self.rules = ForkRules(options, self.allocator, self.recorder.log, engine.context)
        self.runner = RequestRunner(engine, options, self.recorder, self.rid, self.seed)
        self.starter = BranchStarter(options)
        self.async_branches = AsyncBranches(self.runner, self.allocator, self.starter, tasks)

    async def run(self, prompt_ids: tuple[int, ...]) -> Trajectory:
        """Run from the prompt to the end of the trunk."""
        seconds = self.options.budget.seconds
        deadline = asyncio.get_running_loop().time() + seconds if seconds is not None else None
        scope = CancelScope(None, deadline, "seconds")
        allowance = self.rules.trunk_allowance(len(prompt_ids))
        trunk = self.recorder.start_trunk(prompt_ids, allowance, scope)
        try:
            await self._run_sequence(self.engine, trunk, "trunk", len(prompt_ids))
        finally:
            await self.async_branches.release()
        return self.recorder.finish(trunk, self.dialect.name, self.seed, self.runner.supports_seeds)

    async def _run_sequence(
        self, engine: Engine | None, sequence: SequenceState, phase: Phase, new: int
    ) -> None:
        """Decode, fork and join until the sequence ends.

        Args:
            engine: The engine of the sequence, None if it may only be closed.
            sequence: The trunk, or a branch.
            phase: The first phase.
            new: Tokens of its context that the engine has not computed.
        """
        rules = self.rules
        next_phase: Phase = "after" if phase == "trunk" else "rejoin"
        if phase == "trunk" and phase not in self.dialect.grammar.rules:  # the reply begins with a fork
            if not (width := rules.affordable_width(sequence)):
                rules.raise_unaffordable(sequence)
            outlines = rules.unlabelled_outlines(width)
            new, phase = await self._fork_and_join(engine, sequence, outlines, new), next_phase
        while True:
            width, fork = rules.next_fork(sequence)
            if engine and self.options.cap_width_by_load:
                width = await self._cap_width_by_load(engine, sequence, width)
            limits = rules.phase_limits(sequence, width, fork, phase)
            output, call = await self.runner.decode(engine, sequence, phase, new, limits)
            if output.forked and fork == "forbidden" and not rules.can_afford(sequence, output):
                output = replace(output, finish="malformed", forked=False)
            sequence.append_output(output, call)
            if output.is_final:
                break
            if output.wait is not None:
                new = await self.async_branches.join(sequence, output.wait)
            elif self.dialect.asynchronous:
                new = await self.async_branches.spawn(engine, sequence, output.outlines[0], self._run_branch)
            else:
                outlines = output.outlines
                if self.dialect.unlabelled_branches:  # `can_afford` has checked a fork that no grammar bounds
                    outlines = rules.unlabelled_outlines(width or self.options.min_branches)
                new = await self._fork_and_join(engine, sequence, outlines)
            phase = next_phase
        await self.async_branches.join_remaining(sequence)

    async def _fork_and_join(
        self,
        engine: Engine | None,
        sequence: SequenceState,
        outlines: Sequence[Outline],
        new: int | None = None,
    ) -> int:
        """Run one branch for each outline, and write the join into the sequence.

        Args:
            engine: The engine of the sequence.
            sequence: The sequence that forks.
            outlines: What the branches are to do.
            new: Tokens that the engine has not computed. None for those injected since the last decode.

        Returns:
            Tokens of the sequence that the engine has not computed after the join.
        """
        group = BranchGroup(sequence.next_block(), self.recorder.events)
        sequence.allowance.spend(blocks=1)
        fork_span = sequence.span_order[-1]
        identities = self.starter.identities(group.block, outlines)
        group.announce(identities)
        if self.dialect.removes_call_from_context:
            sequence.drop_fork()
        else:
            sequence.inject("lead", self.dialect.grammar.render_rule("lead"))
            new = new if new is None else new + sequence.uncached_tokens
        size = len(identities)
        engines, load = await self.runner.fork(engine, sequence, size, new) if engine else ((), None)
        share = self.allocator.branch_allowance(sequence.allowance, sequence.critical_path, size)
        sequence.allowance.spend(calls=size * share.calls, blocks=size * share.blocks)
        scope = self.starter.scope(sequence)
        start = self.starter.start
        group.branches = [start(sequence, identity, share, scope, fork_span) for identity in identities]
        try:
            await self._run_group(sequence, group, engines, share.tokens, load)
        finally:
            scope.detach()
            for forked in engines:
                await forked.release()
        for branch in group.branches:
            sequence.merge(branch)
        if self.by_message:
            max_tokens = min(share.tokens, share.critical_path_cap)
            written = write_results(self.dialect, sequence, group.branches, max_tokens)
        else:
            written = self._join_context(sequence, group)
        group.joined()
        return written

    async def _run_group(
        self,
        sequence: SequenceState,
        group: BranchGroup,
        engines: Sequence[Engine],
        tokens: int,
        load: Load | None,
    ) -> None:
        """Run the branches of a fork, and commit each that has ended if they join in the KV cache."""
        engine_of: dict[SequenceState, Engine] = dict(zip(group.branches, engines, strict=False))

        async def commit(branch: SequenceState) -> None:
            await self.runner.commit(engine_of[branch], sequence, branch)

        await group.run(
            lambda branch: self._run_branch(engine_of.get(branch), group, branch),
            policy=self.options.effective_policy,
            parallelism=self.runner.choose_parallelism(sequence, len(group.branches), tokens, load),
            after_branch=commit if engines and self.options.join == "kv" else None,
        )

    def _join_context(self, sequence: SequenceState, group: BranchGroup) -> int:
        """Continue after the branches, in the KV cache or as text, and return the tokens not computed."""
        fork = len(sequence.context)
        in_cache = self.options.join == "kv" and self.runner.kv_joiner.join(sequence, fork, group.branches)
        sequence.append_branches(group.branches)
        before = len(sequence.context)
        sequence.inject("tail", self.dialect.grammar.render_rule("tail"))
        uncached = 0 if in_cache else sum(branch.uncached_tokens for branch in group.branches)
        return len(sequence.context) - before + uncached

    async def _run_branch(self, engine: Engine | None, group: BranchGroup, branch: SequenceState) -> None:
        """Run one branch to its end. With on_branch_failure="retry" it restarts once when the engine fails it.

        Raises:
            BranchFailed: The engine failed the branch for good.
        """
        checkpoint = branch.checkpoint() if self.options.on_branch_failure == "retry" else None
        run = partial(
            self._run_sequence, engine, branch, "branch", len(branch.context) - branch.prefix_tokens
        )
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
            events.emit(Delta(branch.path, branch.spans[0].text))
            await run()
        branch.scope.detach()
        group.end(branch)

    async def _cap_width_by_load(self, engine: Engine, sequence: SequenceState, width: int) -> int:
        """At most as wide as would run in parallel now, if the engine says how busy it is."""
        options = self.options
        if width <= options.min_branches or sequence.pending_count or options.pacing is None:
            return width
        load = await self.runner.load(engine, sequence)
        if load is None:
            return width
        share = self.allocator.branch_allowance(sequence.allowance, sequence.critical_path, width)
        parallelism, reason = options.pacing(Demand(width, share.tokens), load)
        capped = max(options.min_branches, min(width, parallelism))
        if capped < width:
            block = (*sequence.path, sequence.blocks + 1)
            self.recorder.log.record_pacing(block, width, capped, load, f"capped: {reason}")
        return capped

    def report(self, error: BaseException | None) -> None:
        """Write the outcome to the log, and to OpenTelemetry if it is installed."""
        requests = self.recorder.log
        tokens = sum(s.tokens for s in self.recorder.graph.spans if s.origin != "prompt")
        outcome = repr(error) if error else "done"
        log.info("%s: %s, %d tokens in %d calls", self.rid, outcome, tokens, len(requests.calls))
        telemetry.export(
            self.dialect.name,
            requests.calls,
            requests.seconds,
            attributes={"apr.rid": self.rid, "apr.tokens": tokens},
            error=error,
        )
