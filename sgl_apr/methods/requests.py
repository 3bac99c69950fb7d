"""Requests of one run of a method: within its budget, after prefixes that the engine has computed."""

from __future__ import annotations

import random
import uuid
from bisect import bisect, insort
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.methods.free_text import free_text_output
from sgl_apr.methods.method_options import check_method_options
from sgl_apr.methods.method_tools import MethodTools
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.runtime.allowance import NO_LIMIT, Allowance
from sgl_apr.runtime.branch_group import BranchGroup
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.continuation import Extend, can_continue, is_penalized
from sgl_apr.runtime.detokenizer import IncrementalDetokenizer
from sgl_apr.runtime.engine_cleanup import release_engines
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.lease_pool import Lease, LeasePool
from sgl_apr.runtime.leases import BranchLeases
from sgl_apr.runtime.option_checks import (
    check_function,
    make_object,
)
from sgl_apr.runtime.options import DEFAULT_DIALECT, make_options
from sgl_apr.runtime.phase_output import PhaseOutput, SpanDraft
from sgl_apr.runtime.prompts import vocab_size
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.request_runner import RequestRunner
from sgl_apr.runtime.running_completion import watched_request
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.spans import Finish, Role

PROMPT_LIMIT = "prompt"  # the limit that a prompt sets itself; it is not recorded as one of the budget's


class MethodRequests:
    """Sends the requests of a method. All sequences pay from one allowance; tokens are reserved before decoding.

    Args:
        engine: Decodes.
        budget: Limits of the run.
        on_event: Is called with every event.
        options: The fields of `ReasonOptions` that concern requests, and sampling parameters.
    """

    def __init__(
        self,
        engine: Engine,
        budget: Budget | Mapping[str, Any] | None,
        on_event: OnEvent | None,
        options: dict[str, Any],
    ) -> None:
        check_method_options({"budget": budget, **options})
        if on_event is not None:
            check_function("on_event", on_event)
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.budget: Budget = Budget() if budget is None else make_object("budget", budget)
        # The budget is not among them: a dialect has a largest width and depth, and a method has neither.
        options = {"logprobs": True, **options}
        self.options = make_options(DEFAULT_DIALECT, self.tokenizer, vocab_size(engine), **options)
        self.recorder = TrajectoryRecorder(self.tokenizer, on_event)
        self.rid = f"apr-{uuid.uuid4().hex}"
        self.seed = self.options.seed if self.options.seed is not None else random.getrandbits(31)
        self.runner = RequestRunner(engine, self.options, self.recorder, self.rid, self.seed)
        self.allowance = Allowance.of(self.budget)
        self.shares_tokens = can_continue(engine, self.options)
        self._tools = None
        if self.options.tools:
            self._tools = MethodTools(engine, self.options, self.budget, self.recorder)
        self._reserved = 0
        self._computed = list[tuple[int, ...]]()  # prefixes that the engine has computed, sorted
        self._forked = list[Engine]()

    @property
    def unreserved_tokens(self) -> int:
        """Tokens that no request has reserved."""
        return self.allowance.tokens - self._reserved

    def reserve(
        self, prompts: Sequence[Prompt], share: float = 1.0, max_tokens: int | None = None
    ) -> list[int]:
        """Set tokens aside for each prompt until `release_tokens` gives them back.

        Args:
            prompts: What will be decoded after.
            share: The part of the unreserved tokens that all of them may take.
            max_tokens: Tokens for each prompt, at most.

        Returns:
            The tokens of each prompt, no more than it asks for.
        """
        equal = max(0, int(self.unreserved_tokens * share) // len(prompts))
        equal = equal if max_tokens is None else min(equal, max_tokens)
        tokens = [min(equal, self._own_limit(p)) for p in prompts]
        self._reserved += sum(tokens)
        return tokens

    def open_leases(
        self, branches: Sequence[SequenceState], prompts: Sequence[Prompt], tokens: Sequence[int]
    ) -> BranchLeases:
        """Let branches share the tokens that were reserved for them.

        Args:
            branches: Those of one fork.
            prompts: What each decodes after.
            tokens: From `reserve`. `release_tokens` gives them back.
        """
        # A method has chosen its width by the budget: all of its branches start.
        pool = LeasePool(sum(tokens), 0, results=False, first_lease=0)
        written = [branch.tokens_used for branch in branches]
        pool.open([0] * len(prompts), max(tokens), [self._max_tokens(p, max(tokens)) for p in prompts])
        before = dict(zip(branches, written, strict=True))

        def final_tokens(branch: SequenceState, _: Lease) -> int:
            return branch.tokens_used - before[branch]

        return BranchLeases(pool, branches, final_tokens, separate=False)

    def _max_tokens(self, prompt: Prompt, equal: int) -> int:
        """What one completion may decode, at most. Where it cannot be continued, that is its equal part."""
        own = min(self.budget.branch_tokens or NO_LIMIT, self._own_limit(prompt))
        # A stop text may begin before the end of a request, and SGLang looks for it in what follows.
        resumes = self.engine.resumes_grammar if prompt.grammar else not prompt.stop
        if "stop" in prompt.sampling:  # of a grammar that does not end there by itself
            resumes = False
        if self.budget.calls is not None:  # a method plans its calls, so none is left for another request
            resumes = False
        resumes = resumes and self.shares_tokens and not is_penalized(prompt.sampling)
        return own if resumes else min(own, equal)

    def _own_limit(self, prompt: Prompt) -> int:
        """Tokens that a prompt asks for at most. Its limit is of one text, between whose calls of tools results stand."""
        several_texts = self._tools is not None and self._tools.may_call(prompt)
        return NO_LIMIT if prompt.tokens is None or several_texts else prompt.tokens

    def release_tokens(self, tokens: int) -> None:
        """Give back tokens that were reserved."""
        self._reserved -= tokens

    def write(self, sequence: SequenceState, prompt: Prompt, waits_for: tuple[int, ...] = ()) -> None:
        """Write the text of a prompt. A prompt without room for it cuts the sequence."""
        path = sequence.graph.longest_path((*sequence.frontier, *waits_for))
        limits = {
            "tokens": self.unreserved_tokens,
            "critical_tokens": self.allowance.critical_path_cap - path,
        }
        limit, left = lowest(limits)
        role: Role = "text" if not sequence.path else "body" if sequence.span_order else "header"
        ids = prompt.encode(self.tokenizer, add_special_tokens=role == "header" and not sequence.context)
        if len(ids) < left:
            label = sequence.identity.outline if role == "header" else ""
            sequence.inject(role, prompt.text, label, waits_for=waits_for, token_ids=ids)
        elif prompt.text:
            sequence.scope.cancel("length", limit)

    async def fork(
        self, parent: Completion, branches: Sequence[SequenceState], tokens: int
    ) -> tuple[Sequence[Engine], int]:
        """Commit what branches have in common, unless the engine has computed it.

        Returns:
            An engine for each branch, none if they may only be closed, and how many branches run at once.
        """
        engine, size = parent.engine, len(branches)
        if engine is None or not branches:
            return (), size
        prefix = common_prefix([branch.context for branch in branches])
        if self.engine.context is not None and len(prefix) >= self.engine.context:
            return [engine] * size, size  # each branch is cut by that limit
        new = self._uncomputed_tokens(prefix) if prefix else 0
        if size == 1 or not prefix or (new <= 1 and prefix != parent.sequence.context):
            return [engine] * size, size
        return await self.commit_prefix(engine, parent.sequence, prefix, size, tokens)

    async def commit_prefix(
        self, engine: Engine, sequence: SequenceState, prefix: tuple[int, ...], size: int, tokens: int
    ) -> tuple[Sequence[Engine], int]:
        """Commit a prefix for branches of a sequence.

        Args:
            engine: The engine of the sequence.
            sequence: The sequence that forks.
            prefix: What its branches have in common.
            size: How many branches there are.
            tokens: Tokens that each may decode.

        Returns:
            As `fork` does.
        """
        new = self._uncomputed_tokens(prefix)
        shared = replace(sequence, context=prefix, span_order=[], kv_layout=())
        engines, load = await self.runner.fork(engine, shared, size, new)
        insort(self._computed, prefix)
        self._forked += engines
        return engines, self.runner.choose_parallelism(sequence, size, tokens, load)

    async def decode(
        self,
        engine: Engine | None,
        sequence: SequenceState,
        prompt: Prompt,
        tokens: int,
        extend: Callable[[], Awaitable[int]] | None = None,
        group: BranchGroup | None = None,
    ) -> Completion:
        """Decode after a sequence. Calls of tools are answered, and the completion is the text after them.

        Args:
            engine: Decodes, None if nothing may be decoded.
            sequence: The sequence.
            prompt: How to decode.
            tokens: Tokens that were reserved for it.
            extend: Waits for more of them, and returns how many it may decode in all.
            group: The group that the sequence is a branch of.
        """
        if engine is None or self._tools is None or not self._tools.may_call(prompt):
            return await self._decode_text(engine, sequence, prompt, tokens, extend)

        async def decode_text(prompt: Prompt, tokens: int) -> Completion:
            return await self._decode_text(engine, sequence, prompt, tokens)

        return await self._tools.decode(engine, sequence, prompt, tokens, decode_text, group)

    async def _decode_text(
        self,
        engine: Engine | None,
        sequence: SequenceState,
        prompt: Prompt,
        tokens: int,
        extend: Callable[[], Awaitable[int]] | None = None,
    ) -> Completion:
        """Decode one text."""
        # A prompt's own limit comes first: where it is granted in full, no limit of the budget acts.
        limits = {} if prompt.tokens is None else {PROMPT_LIMIT: prompt.tokens}
        if sequence.path and self.budget.branch_tokens is not None:
            limits["branch_tokens"] = self.budget.branch_tokens
        limits["tokens"] = tokens
        limits["critical_tokens"] = sequence.allowance.critical_path_cap - sequence.critical_path
        if self.engine.context is not None:
            limits["context"] = self.engine.context - len(sequence.context)
        if sequence.allowance.calls < 1:
            limits = {"calls": 0}
        limit, max_tokens = lowest(limits)
        if engine is None or max_tokens < 1 or sequence.scope.cancel_reason:
            return self.cut(sequence, engine, limit if max_tokens < 1 else sequence.scope.limit)

        async def extend_limits(ids: Sequence[int]) -> int:
            if lowest(limits)[1] > len(ids):  # the engine has cut it, by a limit that it has told nobody
                limits["context"] = len(ids)
            elif extend and lowest(limits)[0] == "tokens":
                limits["tokens"] = await extend()
            return lowest(limits)[1] - len(ids)

        return await self._complete(engine, sequence, prompt, limits, extend_limits)

    def cut(self, sequence: SequenceState, engine: Engine | None, limit: str) -> Completion:
        """End a sequence in which nothing may be decoded."""
        self.recorder.request_log.record_limit(limit, sequence.path)
        finish: Finish = sequence.scope.cancel_reason or "length"
        role: Role = "body" if sequence.path else "text"
        sequence.append_output(PhaseOutput((SpanDraft(role, "decoded", "", ()),), finish), None)
        return Completion(sequence, engine, "", finish)

    async def _complete(
        self,
        engine: Engine,
        sequence: SequenceState,
        prompt: Prompt,
        limits: Mapping[str, int],
        extend: Extend,
    ) -> Completion:
        max_tokens = lowest(limits)[1]
        sampling = prompt.sampling
        if prompt.seed is not None and self.runner.supports_seeds:
            sampling = {**sampling, "sampling_seed": prompt.seed}
        request = self.runner.builder.decode_request(
            sequence.context, max_tokens, grammar=prompt.grammar, stop=prompt.stop, sampling=sampling
        )
        emit = self.recorder.events.delta_callback(sequence.path)
        stream = IncrementalDetokenizer(self.tokenizer, sequence.context, emit)
        if prompt.watch:
            request = watched_request(engine, prompt.watch, request, stream, sequence)
        new = self._uncomputed_tokens(sequence.context)
        result, call = await self.runner.send_request(engine, sequence, "ask", new, request, stream, extend)
        ids = result.token_ids if result else tuple(stream.received_ids)
        ended = bool(ids) and ids[-1] in self.tokenizer.eos_ids
        own = ids[:-1] if ended else ids
        finish: Finish = "stop"
        if result is None:
            finish = sequence.scope.cancel_reason or "aborted"
            if finish != "failed":
                self.recorder.request_log.record_limit(sequence.scope.limit, sequence.path)
        elif result.finish == "length":
            finish, limit = "length", lowest(limits)[0]
            if limit != PROMPT_LIMIT:
                self.recorder.request_log.record_limit(limit, sequence.path)
        elif ended:
            finish = "stop" if prompt.ends_with_eos else "eos"
        if finish == "failed":
            own = ()
        insort(self._computed, (*sequence.context, *own[:-1]))
        text = self.tokenizer.decode(own, sequence.context)
        output = free_text_output(sequence, prompt.tool_syntax, text, own, finish, self.tokenizer)
        sequence.append_output(output, call)
        stream.finish(output)
        logprobs = fmean(result.logprobs) if result and result.logprobs else None
        cut_call = output.pieces[-1].text if output.cut_call else ""
        top = (result and result.top_logprobs) or ()
        return Completion(sequence, engine, text, output.finish, logprobs, output.calls, cut_call, top)

    def _uncomputed_tokens(self, ids: tuple[int, ...]) -> int:
        """How many of these ids no request has computed. The last one is always computed again."""
        at = bisect(self._computed, ids)  # sorted: its neighbours share most with it
        neighbours = self._computed[max(0, at - 1) : at + 1]
        return len(ids) - max((len(common_prefix([ids, known])) for known in neighbours), default=0)

    async def release(self) -> None:
        """Release the engines of all forks."""
        await release_engines(self._forked)


def lowest(limits: Mapping[str, int]) -> tuple[str, int]:
    """The limit that acts first, and its value."""
    return min(limits.items(), key=lambda limit: limit[1])


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of them begin with.

    Examples:
        >>> common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)])
        (1, 2)
    """
    low, high = min(sequences), max(sequences)  # all others lie between, and share what these do
    pairs = enumerate(zip(low, high, strict=False))
    length = next((k for k, (a, b) in pairs if a != b), min(len(low), len(high)))
    return low[:length]
