"""Runs the branches of a fork of a context over one committed prefix, and the merge after them."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from sgl_apr.engine.base import Engine
from sgl_apr.errors import BranchFailed, BudgetExceeded, EngineError
from sgl_apr.methods.call_turns import decode_turns
from sgl_apr.methods.fork_merge import ForkMerger, without_stop
from sgl_apr.methods.fork_prompts import ForkPrompts, PromptRenderer
from sgl_apr.methods.fork_result import ForkResult, TaskResult, TokenUsage
from sgl_apr.methods.fork_task import ForkTask, Merge
from sgl_apr.methods.fork_tools import ForkToolOptions, WorkerTools, decoding_prompt
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.session import MethodSession
from sgl_apr.runtime.allowance import NO_LIMIT, Allowance
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.events import Delta
from sgl_apr.runtime.join_policy import Policy, deadline_seconds
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.rules import load_syntax

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
        tools: The options about tools of the fork.
    """

    def __init__(
        self,
        session: MethodSession,
        prompts: ForkPrompts,
        renderer: PromptRenderer,
        tasks: Sequence[ForkTask],
        merge: Merge | None,
        policy: Policy,
        tools: ForkToolOptions,
    ) -> None:
        self.session, self.requests, self.trunk = session, session.requests, session.root.sequence
        self.prompts, self.tasks = prompts, tasks
        self.merger = ForkMerger(session, renderer, merge, tasks) if merge else None
        self.policy, self.budget = policy, session.budget
        self.requests.runner.cuts_branches |= policy != "all" or any(task.limits for task in tasks)
        self._task_of: dict[SequenceState, ForkTask] = {}
        self._tool_options = {task.name: tools.for_task(task) for task in tasks}
        self._tools: dict[SequenceState, WorkerTools] = {}
        if any(options.get("tools") for options in self._tool_options.values()):
            self.requests.shares_tokens = False  # what a tool returns is not known when tokens are leased

    @property
    def _engine(self) -> Engine:
        engine = self.session.root.engine
        assert engine is not None
        return engine

    @property
    def joins_kv(self) -> bool:
        """Whether the merge continues after the branches in the KV cache."""
        return self.merger is not None and self.merger.joins_kv

    async def run(self) -> ForkResult:
        """Run all branches and the merge.

        Raises:
            BudgetExceeded: The budget has no room for all branches and the merge.
            BranchFailed: The engine failed a branch for good, and failures are to be raised.
        """
        share = await self._share()
        for options in self._tool_options.values():
            if options.get("tools"):
                await load_syntax(replace(self.requests.options, **options), self._engine)
        group = BranchGroup(self.trunk)
        prompts = [decoding_prompt(self._engine, task) for task in self.tasks]
        engines, parallelism = await self.requests.commit_prefix(
            self._engine, self.trunk, self.prompts.shared, len(self.tasks), share.tokens
        )
        self._start(group, share)
        equal = [share.tokens] * len(prompts)  # what a task may not take, the others may
        group.leases = self.requests.open_leases(group.branches, prompts, equal)
        await self._decode_branches(group, prompts, engines, parallelism)
        results = tuple(self._result(branch) for branch in group.branches)
        merged = await self.merger.run(group, results) if self.merger else None
        if not self.merger:
            group.joined()
        trajectory = self.session.finish()
        return ForkResult(results, merged, len(self.prompts.shared), trajectory)

    async def _share(self) -> Allowance:
        """What one branch may spend at most, so that the merge keeps its reserve."""
        left, branches = self.requests.allowance, len(self.tasks)
        reserve = self.budget.reserve if self.merger else 0.0
        tokens = int(left.tokens * (1 - reserve))
        context = self._engine.context
        if context is not None:
            tokens = min(tokens, await self._context_left(context, reserve))
        if tokens < branches:
            raise BudgetExceeded(
                f"{max(0, tokens)} tokens are left for {branches} tasks, expected at least one for each"
            )
        calls = NO_LIMIT
        if self.budget.calls is not None:
            kept = max(1 + branches * self.joins_kv, math.ceil(left.calls * reserve)) if self.merger else 0
            calls = (left.calls - kept - 1) // branches  # one commits the prefix
            if calls < 1:
                needed = 1 + branches * (1 + self.joins_kv) + (self.merger is not None)
                raise BudgetExceeded(f"budget calls={self.budget.calls}, expected at least {needed}")
        tool_calls = left.tool_calls
        if tool_calls < NO_LIMIT:  # equal parts for the tasks that may call tools
            tool_calls //= max(1, sum(map(self._may_call, self.tasks)))
        return Allowance(tokens // branches, left.critical_path_cap, 0, calls, tool_calls=tool_calls)

    def _may_call(self, task: ForkTask) -> bool:
        """Whether a task has tools that it may call."""
        options = self._tool_options[task.name]
        return bool(options.get("tools")) and options.get("tool_choice") != "none"

    async def _context_left(self, context: int, reserve: float) -> int:
        """Tokens that the branches may write together so that everything fits into the context of the engine."""
        for task, ids in zip(self.tasks, self.prompts.tasks, strict=True):
            if len(ids) >= context:
                raise BudgetExceeded(
                    f"the prompt of task {task.name} has {len(ids)} tokens, "
                    f"expected fewer than the {context} of the engine's context"
                )
        if self.merger is None:
            return NO_LIMIT
        used = await self.merger.prompt_tokens(self.prompts.tasks, self.prompts.context)
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
            if not self._may_call(task):
                allowance.tool_calls = 0
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
            self.session.branch_order.place(self.trunk, branch)
            self._task_of[branch] = task
            if self._tool_options[task.name].get("tools"):
                allowance.tokens = min(allowance.tokens, task.token_limit or NO_LIMIT)
                self._tools[branch] = self._worker_tools(task)

    def _worker_tools(self, task: ForkTask) -> WorkerTools:
        limits, budget = task.limits or self.budget, self.budget
        own = Budget(
            reserve=budget.reserve,
            tool_calls=limits.tool_calls,
            tool_seconds=min(limits.tool_seconds, budget.tool_seconds),
            tool_result_tokens=min(limits.tool_result_tokens, budget.tool_result_tokens),
        )
        options, tools = self.requests.options, self._tool_options[task.name]
        return WorkerTools(self._engine, options, tools, own, self.requests.recorder)

    def _scope(self) -> CancelScope:
        """The scope of the branches. They leave the merge its reserve of time."""
        scope, now = self.trunk.scope, asyncio.get_running_loop().time()
        left, policy_s = scope.remaining_seconds(), deadline_seconds(self.policy)
        deadlines = []
        if left is not None and self.merger:
            deadlines.append((now + left * (1 - self.budget.reserve), scope.limit))
        if policy_s is not None:
            deadlines.append((now + policy_s, "policy"))
        deadline, limit = min(deadlines, default=(None, ""))
        return CancelScope(scope, deadline, limit)

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
            if isinstance(error, BranchFailed):  # a tool failed, and that is to be raised
                raise
            if checkpoint is None:
                name = f"branch {branch.identity} ({self._task_of[branch].name})"
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
        leases, before = group.leases, branch.tokens_used
        assert leases is not None

        async def extend() -> int:
            await group.extend(branch, 0)
            return leases.of(branch).tokens

        tools = self._tools.get(branch)
        try:
            if tools is None or engine is None:
                await self.requests.decode(engine, branch, prompt, leases.of(branch).tokens, extend)
            else:
                await self._decode_with_tools(group, branch, engine, tools)
        finally:
            self.requests.allowance.spend(branch.tokens_used - before)

    async def _decode_with_tools(
        self, group: BranchGroup, branch: SequenceState, engine: Engine, tools: WorkerTools
    ) -> None:
        """Decode, run the calls of tools, and continue, until a text ends without calls."""

        async def decode(tokens: int, may_call: bool) -> Completion:
            calls = tools.limits(branch, tokens, may_call=may_call)
            prompt = decoding_prompt(engine, self._task_of[branch], calls, tokens)
            return await self.requests.decode(engine, branch, replace(prompt, tokens=None), tokens)

        await decode_turns(tools.runner, engine, branch, decode, branch.allowance.tokens, group)

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


def answer_text(branch: SequenceState) -> str:
    """What a branch wrote after its prompt and its last call of a tool."""
    texts: list[str] = []
    for span in reversed(branch.spans):
        if span.role != "body":
            break
        texts.append(span.text)
    return "".join(reversed(texts))
