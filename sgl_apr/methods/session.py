"""What methods of a fixed structure are written in: completions that follow a prompt or one another, in one trajectory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from sgl_apr.engine.base import Engine
from sgl_apr.engine.quoted_text import encode_quoted
from sgl_apr.errors import BudgetExceeded
from sgl_apr.methods.branch_order import BranchOrder
from sgl_apr.methods.method_tools import ToolHeading
from sgl_apr.methods.prompt import BranchStart, Completion, Prompt, as_prompt
from sgl_apr.methods.requests import MethodRequests
from sgl_apr.methods.session_prompt import session_prompt
from sgl_apr.runtime.branch_group import BranchGroup, gather
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.engine_cleanup import abort_requests
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.join_policy import Policy
from sgl_apr.runtime.prompts import Prompt as PromptInput
from sgl_apr.runtime.prompts import check_engine, check_token_ids, vocab_size
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.blocks import Branch
from sgl_apr.trajectory.trajectory import Trajectory

T = TypeVar("T")
EnoughCompletions = Callable[[Sequence[Completion]], bool]


class MethodSession:
    """One run of a method under one budget. Use `method_session`, which cleans up.

    Prompts that are sent together run at once after one committed prefix. Of a budget, `width` limits how many run
    at once and `branch_tokens` what one completion may decode. Its depth, blocks and outlines are for models that
    fork by themselves.

    Args:
        engine: Decodes.
        prompt: Text, or token ids that are sent as they are.
        method: The name of the method, for the trajectory.
        budget: Limits of the run.
        on_event: Is called with every event.
        options: Options of `areason` that concern requests (`METHOD_OPTION_NAMES`): retry, on_branch_failure, pacing,
            seed, temperature and so on. Others are refused, since the structure of a method is fixed.

    Attributes:
        root: The prompt as a completion without text.
        heading: How prompts show the tools of the method. None without tools.
        branch_order: Where branches stand in the trajectory.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: str | Sequence[int],
        method: str,
        *,
        budget: Budget | Mapping[str, Any] | None = None,
        on_event: OnEvent | None = None,
        **options: Any,
    ) -> None:
        check_engine(engine)
        self.method = method
        self.requests = MethodRequests(engine, budget, on_event, options)
        self.recorder, self.budget = self.requests.recorder, self.requests.budget
        self.heading: ToolHeading | None = None
        self.branch_order = BranchOrder()
        # An empty prompt is one of contexts that have nothing in common.
        ids = (
            tuple(engine.tokenizer.encode(prompt, add_special_tokens=True))
            if isinstance(prompt, str)
            else check_token_ids(prompt, vocab_size(engine))
        )
        if engine.context is not None and len(ids) >= engine.context:
            raise BudgetExceeded(
                f"the prompt has {len(ids)} tokens, expected fewer than the {engine.context} of the engine's context"
            )
        seconds = self.budget.seconds
        deadline = asyncio.get_running_loop().time() + seconds if seconds is not None else None
        scope = CancelScope(None, deadline, "seconds")
        self.root = Completion(self.recorder.start_trunk(ids, self.requests.allowance, scope), engine)

    async def continue_from(self, completion: Completion, prompt: Prompt | str = "") -> Completion:
        """Continue a completion in its own context."""
        prompt = as_prompt(prompt)
        waits_for = self._ends(prompt.depends_on) if prompt.depends_on else ()
        self.requests.write(completion.sequence, prompt, waits_for)
        (tokens,) = self.requests.reserve([prompt])
        try:
            return await self.requests.decode(completion.engine, completion.sequence, prompt, tokens)
        finally:
            self.requests.release_tokens(tokens)

    async def fork(
        self,
        completion: Completion,
        prompts: Sequence[Prompt | str],
        *,
        share: float = 1.0,
        policy: Policy = "all",
        is_enough: EnoughCompletions | None = None,
        parallelism: int | None = None,
    ) -> list[Completion]:
        """Completions that continue one in parallel, each in a context of its own after it.

        Args:
            completion: What all of them follow.
            prompts: One for each branch.
            share: The part of the unreserved tokens that they may take together.
            policy: When the others are cut.
            is_enough: The same, by a function of the completions that have ended and have not failed, in that order. It
                takes the place of `policy`.
            parallelism: How many run at once, None for all. The others start as those end, or never.

        Returns:
            One completion for each prompt, in order, also those that were cut, and those that failed, without text.
        """
        parent = completion.sequence
        starts = [BranchStart(as_prompt(p), parent.context, parent.frontier) for p in prompts]
        return await self._run(
            completion, starts, share, policy, is_enough=is_enough, parallelism=parallelism
        )

    async def sample_independent(
        self,
        prompts: Sequence[Prompt | str],
        *,
        share: float = 1.0,
        policy: Policy = "all",
        parent: Completion | None = None,
    ) -> list[Completion]:
        """Completions in parallel that see nothing but their own prompt.

        `parent` is the completion that continues after them, by default the root.
        """
        return await self._run(parent or self.root, self._independent(prompts), share, policy)

    async def prefill(
        self,
        prompts: Sequence[Prompt | str],
        *,
        parent: Completion | None = None,
        scope: CancelScope | None = None,
    ) -> list[Completion]:
        """Contexts of their own that hold a prompt each, to continue from later. Nothing is decoded.

        `scope` is until when they may be used, by default as long as the parent.
        """
        parent = parent or self.root
        if not prompts:
            return []
        group, _ = self.start_branches(parent.sequence, self._independent(prompts), scope)
        engines, _ = await self.requests.fork(parent, group.branches, 0)
        for branch in group.branches:
            if branch.scope.cancel_reason and not branch.span_order:  # there was no room for its prompt
                self.requests.cut(branch, None, branch.scope.limit)
            group.end(branch)
        group.joined()
        return [
            Completion(branch, engines[k] if engines else None) for k, branch in enumerate(group.branches)
        ]

    async def samples(
        self, prompts: Sequence[Prompt], n: int, *, share: float = 1.0, scope: CancelScope | None = None
    ) -> list[list[Completion]]:
        """`n` completions of each prompt, all in parallel, each prompt in a context of its own.

        Cancelling `scope` cuts all of them.
        """
        prefilled = await self.prefill(prompts, scope=scope)
        max_tokens = int(self.requests.unreserved_tokens * share) // max(1, len(prompts) * n)

        def sample(completion: Completion, prompt: Prompt) -> Coroutine[Any, Any, list[Completion]]:
            parent = completion.sequence
            starts = [BranchStart(p, parent.context, parent.frontier) for p in prompt.repeated(n)]
            return self._run(completion, starts, 1.0, "all", max_tokens)

        return await gather(sample(c, p) for c, p in zip(prefilled, prompts, strict=True))

    async def sample_with_context(
        self, contexts: Sequence[tuple[str, Sequence[Completion], Prompt]], *, share: float = 1.0
    ) -> list[Completion]:
        """Completions in parallel after any text.

        Args:
            contexts: For each completion the text before it, the completions that the text quotes, whose copies do
                not count as tokens, and its prompt.
            share: The part of the unreserved tokens that they may take together.
        """
        starts = [
            BranchStart(prompt, self._encode(text, prompt.quoted), self._ends(quoted))
            for text, quoted, prompt in contexts
        ]
        return await self._run(self.root, starts, share, "all")

    def affordable_width(self, wanted: int, tokens: int = 1, share: float = 1.0, calls: int = 1) -> int:
        """How many of `wanted` completions the budget can pay for, at least one. The limit that acts is recorded.

        Args:
            wanted: How many there are to be.
            tokens: Tokens that each is to get.
            share: The part of the unreserved tokens that they may take together.
            calls: Calls that each is to get.
        """
        by_tokens = int(self.requests.unreserved_tokens * share) // max(1, tokens)
        affordable = {"": wanted, "tokens": max(1, by_tokens)}
        if self.budget.width is not None:
            affordable["width"] = self.budget.width
        if self.budget.calls is not None:
            affordable["calls"] = max(1, (self.requests.allowance.calls - 1) // calls)
        limit = min(affordable, key=affordable.__getitem__)
        if affordable[limit] < wanted:
            self.recorder.request_log.record_limit(limit, ())
        return affordable[limit]

    def finish(self) -> Trajectory:
        """The trajectory. Call it last."""
        trunk = self.root.sequence
        trunk.span_order = self.branch_order.spans(trunk)
        return self.recorder.finish(
            trunk,
            self.method,
            self.requests.seed,
            seeds_honoured=self.requests.runner.supports_seeds,
            tokens_shared=self.requests.shares_tokens,
        )

    def _ends(self, completions: Sequence[Completion]) -> tuple[int, ...]:
        """The last spans of completions, or of the root if there are none."""
        ends = (i for completion in completions or [self.root] for i in completion.sequence.frontier)
        return tuple(dict.fromkeys(ends))

    def _independent(self, prompts: Sequence[Prompt | str]) -> list[BranchStart]:
        made = (replace(p, text=self._shown(p.text)) for p in map(as_prompt, prompts))
        return [BranchStart(p, waits_for=self._ends(p.depends_on)) for p in made]

    def _encode(self, text: str, quoted: Sequence[str]) -> tuple[int, ...]:
        tokenizer = self.requests.tokenizer
        return tuple(encode_quoted(tokenizer, self._shown(text), quoted, add_special_tokens=True))

    def _shown(self, text: str) -> str:
        return self.heading.shown(text) if self.heading else text

    def start_branches(
        self, sequence: SequenceState, starts: Sequence[BranchStart], scope: CancelScope | None = None
    ) -> tuple[BranchGroup, list[Prompt]]:
        """Start the branches of a fork of `sequence`, until `scope` is cancelled, by default that of the sequence."""
        group = BranchGroup(sequence)
        identities = group.announce([(f"{k}", start.prompt.name) for k, start in enumerate(starts, 1)])
        outer = CancelScope(scope or sequence.scope)
        for identity, start in zip(identities, starts, strict=True):
            branch = group.start(
                identity,
                self.requests.allowance,
                outer,
                context=start.context,
                frontier=start.frontier,
                tolerate_failure=self.requests.options.on_branch_failure != "raise",
            )
            self.branch_order.place(sequence, branch)
            self.requests.write(branch, start.prompt, start.waits_for)
        return group, [start.prompt for start in starts]

    async def _run(
        self,
        parent: Completion,
        starts: Sequence[BranchStart],
        share: float,
        policy: Policy,
        max_tokens: int | None = None,
        *,
        is_enough: EnoughCompletions | None = None,
        parallelism: int | None = None,
    ) -> list[Completion]:
        """Start branches and let them decode, at once or as paced, until `policy` or `is_enough` has enough of them."""
        if not starts:
            return []
        self.requests.runner.cuts_branches |= policy != "all" or is_enough is not None
        group, prompts = self.start_branches(parent.sequence, starts)
        tokens = self.requests.reserve(prompts, share, max_tokens)
        engines, paced = await self.requests.fork(parent, group.branches, max(tokens))
        index = {branch: k for k, branch in enumerate(group.branches)}
        completions = dict[SequenceState, Completion]()
        group.leases = leases = self.requests.open_leases(group.branches, prompts, tokens)
        reserved = sum(tokens)

        async def decode(branch: SequenceState) -> None:
            nonlocal reserved
            k, before = index[branch], branch.tokens_used

            async def extend() -> int:
                await group.extend(branch, 0)
                return leases.of(branch).tokens

            completions[branch] = await self.requests.decode(
                engines[k] if engines else None, branch, prompts[k], leases.of(branch).tokens, extend, group
            )
            written = branch.tokens_used - before  # spent, and so no longer reserved
            reserved -= written
            self.requests.release_tokens(written)
            group.end(branch)

        def have_enough(_: Sequence[Branch]) -> bool:
            assert is_enough
            return is_enough([c for c in completions.values() if c.finish != "failed"])

        limits = (paced, parallelism, self.budget.width)
        try:
            await group.run(
                decode,
                policy=have_enough if is_enough else policy,
                parallelism=min(limit for limit in limits if limit is not None),
            )
        finally:
            self.requests.release_tokens(reserved)
        group.joined()
        return [completions[branch] for branch in group.branches]


@asynccontextmanager
async def method_session(
    engine: Engine, prompt: PromptInput | Prompt, method: str, **options: Any
) -> AsyncIterator[MethodSession]:
    """A session whose requests are aborted if anything fails, and whose forks are released.

    Args:
        engine: Decodes.
        prompt: Text, token ids that are sent as they are, chat messages, or what a task made.
        method: The name of the method, for the trajectory.
        options: As in `MethodSession`.

    Raises:
        AprError: The prompt or an option is wrong.
    """
    heading, ids = await session_prompt(engine, prompt, options)
    session = MethodSession(engine, ids, method, **options)
    session.heading = heading
    try:
        yield session
    except BaseException:
        await abort_requests(engine, session.requests.rid)
        raise
    finally:
        await session.requests.release()
