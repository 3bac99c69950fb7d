"""Sends the requests of one trajectory: seeded, retried, cut by scopes, and recorded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TypeVar

from sgl_apr.engine.base import Engine, Load, Request, Result
from sgl_apr.engine.sglang_names import CACHE_MISS_STATUS
from sgl_apr.errors import EngineError
from sgl_apr.formats.dialects import Phase
from sgl_apr.runtime.activity import Activity
from sgl_apr.runtime.answer_stop import watch_for_stop
from sgl_apr.runtime.branch_judge import BranchJudge
from sgl_apr.runtime.cancel_scope import ScopeCancelled
from sgl_apr.runtime.continuation import Extend, PhaseExtension
from sgl_apr.runtime.detokenizer import IncrementalDetokenizer
from sgl_apr.runtime.eager_branches import EagerBranches
from sgl_apr.runtime.fork_rules import PhaseLimits
from sgl_apr.runtime.kv_join import KvJoiner
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.pacing import Demand, choose_parallelism
from sgl_apr.runtime.phase_output import PhaseOutput, parse_phase_output
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.request_builder import RequestBuilder
from sgl_apr.runtime.retry import as_engine_error
from sgl_apr.runtime.running_completion import watched_request
from sgl_apr.runtime.seeds import derive_seed
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.rules import CallLimits
from sgl_apr.trajectory.spans import Path

T = TypeVar("T")
MAX_RECOMPUTED_TOKENS = 32  # an engine prefills so many tokens in less time than a commit takes
LOAD_TIMEOUT_S = 1.0  # how long a fork waits for the engine's load
log = logging.getLogger(__name__)


class RequestRunner:
    """Sends requests on behalf of the sequences of one trajectory.

    A sequence whose scope is cancelled sends nothing more. An engine that fails a sequence with `tolerate_failure`
    cancels its scope.

    Args:
        engine: Says what kind of engine the requests go to; each call names the engine that it uses.
        options: Of the trajectory.
        recorder: Records requests and limits.
        rid: What request ids begin with.
        seed: What the seeds of requests are derived from.
        activity: Counts requests in flight.

    Attributes:
        cuts_branches: Whether a join policy or a scorer may cut branches, whose text up to there is kept.
        judges: What ends weak branches, by branch.
        eager_branches: Starts branches while their fork is being written. None if the options do not ask for that.
    """

    def __init__(
        self, engine: Engine, options: ReasonOptions, recorder: TrajectoryRecorder, rid: str, seed: int,
        activity: Activity | None = None,
    ) -> None:  # fmt: skip
        self.options, self.rid, self.seed = options, rid, seed
        self._working = activity.working if activity else nullcontext
        self.events, self.request_log = recorder.events, recorder.request_log
        self.supports_seeds = engine.supports_seeds
        self.cuts_branches = options.effective_policy != "all" or options.scoring is not None
        self.judges: dict[SequenceState, BranchJudge] = {}
        self.builder = RequestBuilder(engine, options, rid)
        self.kv_joiner = KvJoiner(self.request_log, self.builder.new_rid)
        self.eager_branches: EagerBranches | None = None

    async def decode(
        self,
        engine: Engine | None,
        sequence: SequenceState,
        phase: Phase,
        new: int,
        limits: PhaseLimits,
        extend: PhaseExtension | None = None,
        calls: CallLimits | None = None,
    ) -> tuple[PhaseOutput, int | None]:
        """Decode one phase. No request is sent where nothing may be decoded.

        Args:
            engine: The engine of the sequence, None if it may send nothing.
            sequence: The sequence that continues.
            phase: The grammar's phase.
            new: Tokens of its context that the engine has not computed.
            limits: Bounds of the request.
            extend: Waits for more tokens where the request was cut by its limit.
            calls: The calls of tools that the phase may end with. None without tools.

        Returns:
            What the phase wrote, and the index of its call.
        """
        numbering, context = self.builder.numbering(sequence), sequence.context
        tokenizer = self.builder.tokenizer
        text = IncrementalDetokenizer(tokenizer, context, self.events.delta_callback(sequence.path))
        result, call = None, None
        watch_for_stop(text, self.options, sequence, phase, limits, calls)
        if engine and self.eager_branches and limits.fork != "forbidden":
            self.eager_branches.watch(text, engine, sequence, phase, numbering)
        if engine and extend and limits.max_new_tokens < 1 and not sequence.scope.cancel_reason:
            more = await self._further_tokens(sequence, (), extend)
            limits = replace(limits, max_new_tokens=more or 0)
        if engine and limits.max_new_tokens > 0 and not sequence.scope.cancel_reason:
            request = self.builder.phase_request(sequence, phase, numbering, limits, calls)
            if judge := self.judges.get(sequence):
                request = watched_request(
                    engine, judge.watch, request, text, sequence, judge.running.get(sequence)
                )
            result, call = await self.send_request(engine, sequence, phase, new, request, text, extend)
        cut = sequence.scope.cancel_reason if result is None else None
        if cut is None and (result is None or result.finish == "length"):
            cut = "length"
        ids = tuple(text.received_ids) if result is None else result.token_ids
        output = parse_phase_output(
            self.options.dialect, phase, numbering, context, ids, cut, tokenizer,
            completes_fork=limits.fork != "forbidden" or sequence.pending_count > 0,
            max_filler_tokens=sequence.max_filler_tokens,
            tool_syntax=calls.parsed_syntax if calls else None, resumed=bool(calls and calls.resumed),
        )  # fmt: skip
        if cut == "length" and output.finish != "stop":  # a phase that ends where it was cut lacks nothing
            limit = extend.limiting_field if extend else limits.limiting_field
            self.request_log.record_limit(limit, sequence.path)
        elif cut in ("timeout", "aborted") and output.finish == cut:
            self.request_log.record_limit(sequence.scope.limit, sequence.path)
        text.finish(output)
        return output, call

    async def send_request(
        self,
        engine: Engine,
        sequence: SequenceState,
        phase: str,
        new: int,
        request: Request,
        text: IncrementalDetokenizer,
        extend: Extend | None = None,
    ) -> tuple[Result | None, int]:
        """Send a request that decodes, and continue it for as long as its limit is extended.

        Returns:
            The result, None if the request was cut or failed, and the index of its call. It was also cut if its
            sequence was while it waited to continue.
        """
        derived = derive_seed(self.seed, sequence.path, sequence.requests)
        seed = request.sampling.get("sampling_seed", derived)
        sequence.requests += 1
        if self.supports_seeds:
            request = replace(request, sampling={**request.sampling, "sampling_seed": seed})
        early = self.eager_branches.take(sequence, request) if self.eager_branches else None
        started = early.started if early else time.monotonic()
        needs_tokens = text.emit is not None or self._may_be_cut(sequence)

        async def decode(request: Request) -> tuple[Result | None, int]:
            async def attempt(request: Request) -> Result:
                nonlocal early
                self.events.retract_text(sequence.path, text.reset())
                if early:
                    waiting, early = early, None  # one that fails is repeated like any other
                    return await waiting.result(request.max_tokens, text)
                if needs_tokens:
                    return await engine.decode(request, text)
                result = await engine.decode(request)
                text(result.token_ids)
                return result

            return await self.run_with_retries(
                sequence, lambda: self.kv_joiner.send(engine, sequence, sequence.allowance, request, attempt)
            )

        result, retries = await decode(request)
        continuations, cut_while_waiting = 0, False
        while extend and result and result.finish == "length":
            if not (more := await self._further_tokens(sequence, result.token_ids, extend)):
                cut_while_waiting = more is None
                break
            text.keep()
            ids = (*sequence.context, *result.token_ids)
            further, repeated = await decode(
                replace(request, input_ids=ids, max_tokens=more, resumed_tokens=len(result.token_ids))
            )
            result = result.continued_by(further) if further else None
            retries, continuations = retries + repeated, continuations + 1
        if sequence.scope.reason == "failed":
            self.events.retract_text(sequence.path, text.discard())
        received = result or Result(tuple(text.received_ids), "length", len(request.input_ids), None)
        name = "branch" if sequence.path else phase
        call = self.request_log.record_request(
            name, sequence.path, received, new, started, seed, retries, continuations
        )
        return None if cut_while_waiting else result, call

    def first_seed(self, path: Path) -> int | None:
        """The seed of the first request of the sequence at `path`, None if the engine has no seeds."""
        return derive_seed(self.seed, path, 0) if self.supports_seeds else None

    def _may_be_cut(self, sequence: SequenceState) -> bool:
        """Whether a deadline or the join policy may end a request of a sequence, which then keeps what has arrived."""
        return sequence.scope.may_be_cancelled or bool(sequence.path and self.cuts_branches)

    async def _further_tokens(
        self, sequence: SequenceState, ids: Sequence[int], extend: Extend
    ) -> int | None:
        """Tokens that may follow what a phase has decoded up to its limit, 0 for none, None if it was cut meanwhile."""
        try:
            more = await sequence.scope.run(extend(ids))
        except ScopeCancelled:
            return None
        if sequence.scope.cancel_reason:  # at the moment at which it could continue
            return None
        return max(0, more) if sequence.allowance.calls > 0 else 0

    async def fork(
        self,
        engine: Engine,
        sequence: SequenceState,
        size: int,
        new: int | None = None,
        max_recomputed_tokens: int = 0,
    ) -> tuple[Sequence[Engine], Load | None]:
        """Commit what a sequence has written, for branches that continue after it.

        Where the engine still has what the sequence has decoded, only the tokens since then are missing: the last decoded
        one and those injected. If they are few, each branch computes them, which takes less time than a commit.

        Args:
            engine: The engine of the sequence.
            sequence: The sequence that forks.
            size: How many branches there are.
            new: Tokens that the engine has not computed. None for those injected since the last decode.
            max_recomputed_tokens: Tokens that the branches may compute together, over those that a commit computes.

        Returns:
            An engine for each branch, and the engine's load. No engines where nothing may be sent any more: such
            branches can only be closed.
        """
        if sequence.scope.cancel_reason or sequence.allowance.calls < 1:
            return (), None
        new, started = sequence.uncached_tokens if new is None else new, time.monotonic()
        load = asyncio.create_task(self.load(engine, sequence)) if self.options.pacing and size > 1 else None
        sequence.uncommitted_tokens = 0
        try:
            if (
                engine.caches_output
                and self.options.join != "kv"
                and (size - 1) * (new + 1) <= max_recomputed_tokens
            ):
                sequence.uncommitted_tokens = new + 1
                return [engine] * size, await load if load else None
            prefix = self.builder.commit_request(sequence)

            async def attempt(request: Request) -> tuple[Result, Sequence[Engine]]:
                return await engine.fork(request, size)

            forked, retries = await self.run_with_retries(
                sequence, lambda: self.kv_joiner.send(engine, sequence, sequence.allowance, prefix, attempt)
            )
            committed, engines = forked or (Result((), "length", len(sequence.context), None), ())
            self.request_log.record_request("commit", sequence.path, committed, new, started, None, retries)
            return engines, await load if load and engines else None
        finally:
            if load:
                load.cancel()

    def choose_parallelism(self, sequence: SequenceState, size: int, tokens: int, load: Load | None) -> int:
        """How many branches of so many tokens run at once. The decision is recorded."""
        if self.options.pacing is None or load is None:
            return size
        parallelism, reason = choose_parallelism(self.options.pacing, Demand(size, tokens), load)
        parallelism = max(1, min(size, parallelism))
        self.request_log.record_pacing((*sequence.path, sequence.blocks), size, parallelism, load, reason)
        return parallelism

    async def commit(self, engine: Engine, sequence: SequenceState, branch: SequenceState) -> None:
        """Commit a branch of `sequence` that has ended, so that it can be joined in the KV cache.

        The sequence pays. Where nothing may be sent, or the engine fails, the branch stays uncommitted.
        """
        if sequence.scope.cancel_reason or sequence.allowance.calls < 2:
            return
        new, started = max(1, branch.uncached_tokens), time.monotonic()
        prefix = self.builder.commit_request(branch)
        result, retries = await self.run_with_retries(
            sequence,
            lambda: self.kv_joiner.send(engine, branch, sequence.allowance, prefix, engine.commit),
            ignore_failure=True,
        )
        if result:
            branch.committed = True
            self.request_log.record_request("commit", branch.path, result, new, started, None, retries)

    async def load(self, engine: Engine, sequence: SequenceState) -> Load | None:
        """The engine's load, None if it does not answer in time."""
        left = sequence.scope.remaining_seconds()
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S if left is None else min(LOAD_TIMEOUT_S, left)):
                return await engine.load()
        except (EngineError, OSError) as error:  # also TimeoutError
            log.info("%s: the load of the engine is not known (%r)", self.rid, error)
            return None

    async def run_with_retries(
        self, sequence: SequenceState, attempt: Callable[[], Awaitable[T]], ignore_failure: bool = False
    ) -> tuple[T | None, int]:
        """Run `attempt` at the expense of a sequence, again after passing errors.

        Returns:
            What `attempt` returned, None if it was cut or failed for good, and how often it was repeated.
        """
        allowance, tries = sequence.allowance, 0

        async def paid_attempt() -> T:
            nonlocal tries
            tries += 1
            allowance.spend(calls=1)
            try:
                return await attempt()
            except OSError as error:  # also TimeoutError
                if error is self.events.failure:
                    raise
                raise as_engine_error(error) from error

        try:
            work = self.options.retry(paid_attempt, lambda: allowance.calls > 0)
            with self._working():
                result = await sequence.scope.run(work)
        except ScopeCancelled:
            result = None
        except EngineError as error:
            # With more calls, what the cache has lost could be committed again.
            out_of_calls = error.status == CACHE_MISS_STATUS and allowance.calls < 1
            if out_of_calls:
                self.request_log.record_limit("calls", sequence.path)
            if out_of_calls or ignore_failure:
                log.info("%s: %s", self.rid, error)
                return None, max(0, tries - 1)
            if not sequence.tolerate_failure:
                raise
            log.warning("%s: branch %s failed, and is skipped: %s", self.rid, sequence.identity, error)
            sequence.scope.cancel("failed")
            result = None
        return result, max(0, tries - 1)
