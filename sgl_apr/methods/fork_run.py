"""Runs the branches of a fork of a context over one committed prefix, and the merge after them."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from sgl_apr.engine.base import Engine
from sgl_apr.errors import BranchFailed, BudgetExceeded, EngineError
from sgl_apr.methods.fork_prompts import ForkPrompts, PromptRenderer, with_text_before
from sgl_apr.methods.fork_result import ForkResult, TaskResult, TokenUsage, render_results
from sgl_apr.methods.fork_task import ForkTask, Merge
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.session import MethodSession
from sgl_apr.runtime.allowance import NO_LIMIT, Allowance
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.events import Delta
from sgl_apr.runtime.join_policy import Policy, deadline_seconds
from sgl_apr.runtime.sequence import SequenceState

MERGE_NAME = "merge"
log = logging.getLogger(__name__)


class ForkRun:
    """One fork of a context.

    Args:
        session: Holds the prompt that all branches have in common, and the budget.
        prompts: The prompts of the branches.
        renderer: Renders what follows the branches.
        tasks: One for each branch.
        merge: What follows the branches, if anything.
        policy: When the branches end.
    """

    def __init__(
        self,
        session: MethodSession,
        prompts: ForkPrompts,
        renderer: PromptRenderer,
        tasks: Sequence[ForkTask],
        merge: Merge | None,
        policy: Policy,
    ) -> None:
        self.session, self.requests, self.trunk = session, session.requests, session.root.sequence
        self.prompts, self.renderer, self.tasks, self.merge = prompts, renderer, tasks, merge
        self.policy, self.budget = policy, session.budget
        self.requests.runner.cuts_branches |= policy != "all" or any(task.limits for task in tasks)
        self._outlines = [task.outline for task in tasks]
        self._task_of: dict[SequenceState, ForkTask] = {}

    @property
    def joins_kv(self) -> bool:
        """Whether the merge continues after the branches in the KV cache."""
        return self.merge is not None and self.merge.join == "kv"

    async def run(self) -> ForkResult:
        """Run all branches and the merge.

        Raises:
            BudgetExceeded: The budget has no room for all branches and the merge.
            BranchFailed: The engine failed a branch for good, and failures are to be raised.
        """
        share = await self._share()
        group = BranchGroup(self.trunk)
        prompts = [self._decoding(task) for task in self.tasks]
        engine = self.session.root.engine
        assert engine is not None
        engines, parallelism = await self.requests.commit_prefix(
            engine, self.trunk, self.prompts.shared, len(self.tasks), share.tokens
        )
        self._start(group, share)
        equal = [share.tokens] * len(prompts)  # what a task may not take, the others may
        group.leases = self.requests.open_leases(group.branches, prompts, equal)
        await self._decode_branches(group, prompts, engines, parallelism)
        results = tuple(self._result(branch) for branch in group.branches)
        merged = await self._merge(group, results) if self.merge else None
        if not self.merge:
            group.joined()
        trajectory = self.session.finish()
        return ForkResult(results, merged, len(self.prompts.shared), trajectory)

    async def _share(self) -> Allowance:
        """What one branch may spend at most, so that the merge keeps its reserve."""
        left, branches = self.requests.allowance, len(self.tasks)
        reserve = self.budget.reserve if self.merge else 0.0
        tokens = int(left.tokens * (1 - reserve))
        context = self.session.root.engine.context if self.session.root.engine else None
        if context is not None:
            tokens = min(tokens, await self._context_left(context, reserve))
        if tokens < branches:
            raise BudgetExceeded(
                f"{max(0, tokens)} tokens are left for {branches} tasks, expected at least one for each"
            )
        calls = NO_LIMIT
        if self.budget.calls is not None:
            kept = max(1 + branches * self.joins_kv, math.ceil(left.calls * reserve)) if self.merge else 0
            calls = (left.calls - kept - 1) // branches  # one commits the prefix
            if calls < 1:
                needed = 1 + branches * (1 + self.joins_kv) + (self.merge is not None)
                raise BudgetExceeded(f"budget calls={self.budget.calls}, expected at least {needed}")
        tool_calls = left.tool_calls if left.tool_calls >= NO_LIMIT else left.tool_calls // branches
        return Allowance(tokens // branches, left.critical_path_cap, 0, calls, tool_calls=tool_calls)

    async def _context_left(self, context: int, reserve: float) -> int:
        """Tokens that the branches may write together so that everything fits into the context of the engine."""
        for task, ids in zip(self.tasks, self.prompts.tasks, strict=True):
            if len(ids) >= context:
                raise BudgetExceeded(
                    f"the prompt of task {task.name} has {len(ids)} tokens, "
                    f"expected fewer than the {context} of the engine's context"
                )
        if self.merge is None:
            return NO_LIMIT
        if self.joins_kv:
            used = sum(map(len, self.prompts.tasks)) - (len(self.tasks) - 1) * len(self.prompts.context)
            used += len(await self.renderer.render_after_branch(self.merge, self.tasks[0]))
        else:
            empty = [TaskResult(task.name, "", "stop") for task in self.tasks]
            used = len(await self.renderer.render_merge(self.merge, render_results(empty, self._outlines)))
        return int((context - used - 1) * (1 - reserve))

    def _start(self, group: BranchGroup, share: Allowance) -> None:
        """Start a branch for each task, with its prompt as its header."""
        graph = self.trunk.graph
        identities = group.announce([(str(k), task.outline) for k, task in enumerate(self.tasks, 1)])
        scope, fork = self._scope(), len(self.trunk.context)
        now = asyncio.get_running_loop().time()
        for identity, task, ids in zip(identities, self.tasks, self.prompts.tasks, strict=True):
            limits = task.limits
            deadline = now + limits.seconds if limits and limits.seconds is not None else None
            allowance = replace(share)
            if limits:
                allowance.calls = min(allowance.calls, limits.calls or NO_LIMIT)
                if limits.tool_calls is not None:
                    allowance.tool_calls = min(allowance.tool_calls, limits.tool_calls)
            self.requests.allowance.spend(
                calls=allowance.calls if share.calls < NO_LIMIT else 0,
                tool_calls=allowance.tool_calls if share.tool_calls < NO_LIMIT else 0,
            )
            branch = group.start(
                identity,
                allowance,
                CancelScope(scope, deadline, "seconds"),
                tolerate_failure=self.requests.options.on_branch_failure == "skip",
            )
            header = ids[fork:]
            text = graph.tokenizer.decode(header, self.trunk.context)
            branch.inject("header", text, task.outline, charged=False, token_ids=header)
            self.session.place_branch(self.trunk, branch)
            self._task_of[branch] = task

    def _scope(self) -> CancelScope:
        """The scope of the branches. They leave the merge its reserve of time."""
        scope, now = self.trunk.scope, asyncio.get_running_loop().time()
        left, policy_s = scope.remaining_seconds(), deadline_seconds(self.policy)
        deadlines = []
        if left is not None and self.merge:
            deadlines.append((now + left * (1 - self.budget.reserve), scope.limit))
        if policy_s is not None:
            deadlines.append((now + policy_s, "policy"))
        deadline, limit = min(deadlines, default=(None, ""))
        return CancelScope(scope, deadline, limit)

    @staticmethod
    def _decoding(task: ForkTask) -> Prompt:
        return Prompt(
            tokens=task.token_limit,
            stop=task.stops,
            sampling=task.sampling,
            ends_with_eos=True,
            name=task.name,
        )

    async def _decode_branches(
        self, group: BranchGroup, prompts: Sequence[Prompt], engines: Sequence[Engine], parallelism: int
    ) -> None:
        """Let all branches decode until the policy has enough of them."""
        prompt_of = dict(zip(group.branches, prompts, strict=True))
        engine_of = dict(zip(group.branches, engines, strict=False))
        if self.budget.width is not None:
            parallelism = min(parallelism, self.budget.width)

        async def run_branch(branch: SequenceState) -> None:
            await self._run_branch(group, branch, prompt_of[branch], engine_of.get(branch))

        async def commit(branch: SequenceState) -> None:
            if branch.finish != "failed":
                await self.requests.runner.commit(engine_of[branch], self.trunk, branch)

        await group.run(
            run_branch,
            policy=self.policy,
            parallelism=parallelism,
            after_branch=commit if self.joins_kv and engines else None,
        )

    async def _run_branch(
        self, group: BranchGroup, branch: SequenceState, prompt: Prompt, engine: Engine | None
    ) -> None:
        """Run one branch to its end. With on_branch_failure="retry" it restarts once when the engine fails it."""
        checkpoint = branch.checkpoint() if self.requests.options.on_branch_failure == "retry" else None
        try:
            await self._decode_branch(group, branch, prompt, engine)
        except EngineError as error:
            if checkpoint is None:
                name = f"branch {branch.identity} ({prompt.name})"
                raise BranchFailed(f"{name}: {error}", branch.path, error.status) from error
            log.warning("%s: branch %s failed, and restarts: %s", self.requests.rid, branch.identity, error)
            events = self.trunk.graph.events
            events.retract_text(branch.path, None)
            branch.restart(checkpoint)
            branch.tolerate_failure = True
            events.emit(Delta(branch.path, branch.spans[0].text))
            await self._decode_branch(group, branch, prompt, engine)
        left = branch.allowance
        self.requests.allowance.refund(calls=left.calls if self.budget.calls is not None else 0)
        if self.budget.tool_calls is not None:
            self.requests.allowance.spend(tool_calls=-left.tool_calls)
        left.calls = left.tool_calls = 0
        group.end(branch)

    async def _decode_branch(
        self, group: BranchGroup, branch: SequenceState, prompt: Prompt, engine: Engine | None
    ) -> None:
        leases = group.leases
        assert leases is not None
        before = branch.tokens_used

        async def extend() -> int:
            await group.extend(branch, 0)
            return leases.of(branch).tokens

        await self.requests.decode(engine, branch, prompt, leases.of(branch).tokens, extend)
        self.requests.allowance.spend(branch.tokens_used - before)

    def _result(self, branch: SequenceState) -> TaskResult:
        """What a branch returned."""
        task, request_log, path = self._task_of[branch], self.requests.recorder.request_log, branch.path
        calls = [call for call in request_log.calls if call.path == path and call.phase == "branch"]
        return TaskResult(
            task.name,
            without_stop(answer_text(branch), task.stops),
            branch.finish or "aborted",
            TokenUsage.of_calls(calls),
            tuple(call for call in request_log.tool_calls if call.path == path),
            path,
        )

    async def _merge(self, group: BranchGroup, results: Sequence[TaskResult]) -> TaskResult:
        """Continue after the branches: by their text, or in the KV cache."""
        merge, trunk = self.merge, self.trunk
        assert merge is not None
        ends = tuple(i for branch in group.branches for i in branch.frontier)
        if merge.join == "kv":
            ids = await self._join_kv(group, merge, results)
            waits_for: tuple[int, ...] = ()
        else:
            complete = await self.renderer.render_merge(merge, render_results(results, self._outlines))
            ids, waits_for = complete[len(trunk.context) :], ends
        text = trunk.graph.tokenizer.decode(ids, trunk.context)
        trunk.inject("tail", text, waits_for=waits_for, charged=False, token_ids=ids)
        group.joined()
        prompt = Prompt(
            tokens=merge.max_tokens, stop=merge.stops, sampling=merge.sampling, ends_with_eos=True
        )
        calls = len(self.requests.recorder.request_log.calls)
        completion = await self.requests.decode(
            self.session.root.engine, trunk, prompt, self.requests.allowance.tokens
        )
        made = self.requests.recorder.request_log.calls[calls:]
        usage = TokenUsage.of_calls([call for call in made if not call.path])
        return TaskResult(MERGE_NAME, without_stop(completion.text, merge.stops), completion.finish, usage)

    async def _join_kv(
        self, group: BranchGroup, merge: Merge, results: Sequence[TaskResult]
    ) -> tuple[int, ...]:
        """Let the trunk continue after the branches that did not fail, and return the merge's prompt."""
        joined = [branch for branch in group.branches if branch.finish != "failed"]
        fork = len(self.trunk.context)
        pairs = zip(results, self._outlines, strict=True)
        if failed := [pair for pair in pairs if pair[0].finish == "failed"]:
            merge = replace(
                merge, prompt=with_text_before(merge.prompt, render_results(*zip(*failed, strict=True)))
            )
        if not joined:
            complete = await self.renderer.render_merge(
                replace(merge, join="text"), render_results(results, self._outlines)
            )
            return complete[fork:]
        ids = await self.renderer.render_after_branch(merge, self.tasks[0])
        self.requests.runner.kv_joiner.join(self.trunk, fork, joined)
        self.trunk.append_branches(joined)
        return ids


def answer_text(branch: SequenceState) -> str:
    """What a branch wrote after its prompt and its last call of a tool."""
    texts: list[str] = []
    for span in reversed(branch.spans):
        if span.role != "body":
            break
        texts.append(span.text)
    return "".join(reversed(texts))


def without_stop(text: str, stops: Sequence[str]) -> str:
    """A text without the stop text that ended it."""
    for stop in stops:
        if text.endswith(stop):
            return text[: -len(stop)]
    return text
