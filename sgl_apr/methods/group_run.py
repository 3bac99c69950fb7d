"""Runs the workers of one group for a method: within its budget, with events, until enough of them have an answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from sgl_apr.engine.base import Engine, GroupRequest, Request, Result
from sgl_apr.errors import EngineError
from sgl_apr.methods.free_text import free_text_output
from sgl_apr.methods.prompt import BranchStart, Completion, Prompt
from sgl_apr.methods.requests import PROMPT_LIMIT, lowest
from sgl_apr.methods.session import MethodSession
from sgl_apr.runtime.detokenizer import IncrementalDetokenizer
from sgl_apr.runtime.retry import is_retryable
from sgl_apr.runtime.seeds import derive_seed
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.spans import Finish
from sgl_apr.trajectory.worker_groups import GroupKind, GroupRecord

log = logging.getLogger(__name__)


@dataclass(eq=False)
class GroupWorker:
    """One worker of a group that runs.

    Attributes:
        sequence: Its branch.
        prompt: How it decodes.
        stream: Turns its tokens into text as they arrive.
        text: What it has written, without its header.
        step_ends: Where in the text the last of its steps ends, if steps end.
        completion: Its completion, once it has ended.
        error: What ended it, if that was an error.
        request: Its request, if it may decode.
        limits: Tokens that it may decode by each limit.
        seed: The seed of its sampling.
    """

    sequence: SequenceState
    prompt: Prompt
    stream: IncrementalDetokenizer
    text: str = ""
    step_ends: int = 0
    completion: Completion | None = None
    error: EngineError | None = None
    request: Request | None = None
    limits: dict[str, int] = field(default_factory=dict)
    seed: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the model has ended it."""
        return self.completion is not None and self.completion.is_complete


class GroupRun:
    """Decodes the workers of a group after the prompt of a session. Each worker is a branch.

    Workers share no tokens of the budget: each has an equal part, because a worker cannot be continued.

    Args:
        session: The session. Its prompt is what the workers have in common.
        kind: The kind of the group.
        prompts: One for each worker. Its text is the worker's header.
        step_end: Text that ends a step of Hogwild!.
        is_enough: Whether the others may be cut, called when a worker or a step has ended.
    """

    def __init__(
        self,
        session: MethodSession,
        engine: Engine,
        kind: GroupKind,
        prompts: Sequence[Prompt],
        *,
        is_enough: Callable[[Sequence[GroupWorker]], bool],
        step_end: str | None = None,
    ) -> None:
        self._session, self._requests, self._engine = session, session.requests, engine
        self._kind, self._prompts, self._step_end, self._is_enough = kind, prompts, step_end, is_enough
        self._log, self._events = session.recorder.request_log, session.recorder.events
        self.workers: list[GroupWorker] = []
        self._aborting = set[asyncio.Task[None]]()
        self._started, self._attempts, self._cut = time.monotonic(), 0, False

    async def run(self) -> list[GroupWorker]:
        """Decode until all workers have ended, or were cut.

        Raises:
            EngineError: The engine refuses the group. Or a worker, or all of them, failed for good, and failed branches
                are to raise.
        """
        trunk = self._session.root.sequence
        starts = [BranchStart(prompt, trunk.context, trunk.frontier) for prompt in self._prompts]
        self._group, prompts = self._session.start_branches(trunk, starts)
        self.workers = [self._worker(*pair) for pair in zip(self._group.branches, prompts, strict=True)]
        tokens = self._requests.reserve(prompts)
        self._reserved = sum(tokens)
        try:
            await self._commit(trunk)
            if live := self._prepare(tokens):
                await self._decode(trunk, live)
        finally:
            self._requests.release_tokens(self._reserved)
            if self._aborting:
                await asyncio.wait(self._aborting)
        self._group.joined()
        return self.workers

    async def _commit(self, trunk: SequenceState) -> None:
        """Compute what the workers have in common, so that only their headers are left to read."""
        if trunk.scope.cancel_reason or trunk.allowance.calls <= len(self.workers):
            return
        runner, started = self._requests.runner, time.monotonic()
        result, retries = await runner.run_with_retries(
            trunk, lambda: self._engine.commit(runner.builder.commit_request(trunk))
        )
        result = result or Result((), "length", len(trunk.context), None)
        self._log.record_request("commit", (), result, len(trunk.context), started, None, retries)

    def _prepare(self, tokens: Sequence[int]) -> list[GroupWorker]:
        """Make the requests of the workers that may decode. The others are cut."""
        trunk, builder = self._session.root.sequence, self._requests.runner.builder
        header = max(len(worker.sequence.context) for worker in self.workers) - len(trunk.context)
        live = []
        for worker, reserved in zip(self.workers, tokens, strict=True):
            sequence, prompt = worker.sequence, worker.prompt
            worker.limits = self._limits(worker, reserved, header)
            limit, max_tokens = lowest(worker.limits)
            if max_tokens < 1 or sequence.scope.cancel_reason:
                limit = limit if max_tokens < 1 else sequence.scope.limit
                worker.completion = self._requests.cut(sequence, self._engine, limit)
                self._group.end(sequence)
                continue
            worker.request = builder.decode_request(
                sequence.context,
                max_tokens,
                grammar=prompt.grammar,
                stop=prompt.stop,
                sampling=prompt.sampling,
            )
            worker.seed = derive_seed(self._requests.seed, sequence.path, sequence.requests)
            sequence.requests += 1
            if self._requests.runner.supports_seeds:
                sampling = {**worker.request.sampling, "sampling_seed": worker.seed}
                worker.request = replace(worker.request, sampling=sampling)
            live.append(worker)
        return live

    def _limits(self, worker: GroupWorker, reserved: int, header: int) -> dict[str, int]:
        sequence, budget, context = worker.sequence, self._requests.budget, self._engine.context
        if sequence.allowance.calls < len(self.workers):
            return {"calls": 0}
        limits = {} if worker.prompt.tokens is None else {PROMPT_LIMIT: worker.prompt.tokens}
        if budget.branch_tokens is not None:
            limits["branch_tokens"] = budget.branch_tokens
        limits["tokens"] = reserved
        limits["critical_tokens"] = sequence.allowance.critical_path_cap - sequence.critical_path
        if context is not None:
            # All workers stand in one context. One more token is sampled while the last one is read.
            prompt = len(self._session.root.sequence.context)
            limits["context"] = (context - prompt) // len(self.workers) - header - 1
        return limits

    async def _decode(self, trunk: SequenceState, live: list[GroupWorker]) -> None:
        runner = self._requests.runner
        prompt_tokens = len(trunk.context)
        group = self._request(live, prompt_tokens)
        position_range = group.position_range if self._kind == "group_think" else 0
        self._log.record_group(
            GroupRecord(self._group.block, self._kind, position_range, self._step_end or "")
        )
        error: EngineError | None = None

        async def attempt() -> None:
            nonlocal error
            if error and trunk.allowance.calls < len(live) - 1:
                raise error
            trunk.allowance.spend(calls=len(live) - 1)  # the runner pays for one
            try:
                await self._send(live, prompt_tokens)
            except EngineError as failure:
                error = failure
                raise

        try:
            await runner.run_with_retries(trunk, attempt)
        except EngineError as failure:
            is_refused = (
                failure.status is not None and 400 <= failure.status < 500
            )  # not the fault of a worker
            if is_refused or self._requests.options.on_branch_failure == "raise":
                raise
        for worker in live:
            if worker.completion is None:
                self._close(worker, worker.error or error)

    async def _send(self, live: list[GroupWorker], prompt_tokens: int) -> None:
        """Send the group once.

        Raises:
            EngineError: No worker has a result, and the group may run again.
        """
        self._attempts += 1
        for worker in live:
            assert worker.request is not None
            self._events.retract_text(worker.sequence.path, worker.stream.reset())
            worker.text, worker.step_ends, worker.error = "", 0, None
            worker.request = replace(worker.request, rid=self._requests.runner.builder.new_rid())
        request, sinks = self._request(live, prompt_tokens), [worker.stream for worker in live]
        await self._engine.group(request, sinks, lambda k, outcome: self._end(live[k], outcome))
        errors = [worker.error for worker in live if worker.completion is None and worker.error]
        # The group ended as one, for instance because it had to make room for other requests.
        if len(errors) == len(live) and is_retryable(errors[0]):
            raise errors[0]

    def _request(self, live: Sequence[GroupWorker], prompt_tokens: int) -> GroupRequest:
        requests = tuple(worker.request for worker in live if worker.request)
        return GroupRequest(self._kind, requests, prompt_tokens, self._step_end)

    def _worker(self, sequence: SequenceState, prompt: Prompt) -> GroupWorker:
        emit = self._events.delta_callback(sequence.path)

        def receive(text: str) -> None:
            if emit:
                emit(text)
            if worker.completion is None:
                worker.text += text
                if self._find_step_end(worker):
                    self._check()

        stream = IncrementalDetokenizer(self._requests.tokenizer, sequence.context, receive)
        worker = GroupWorker(sequence, prompt, stream)
        return worker

    def _find_step_end(self, worker: GroupWorker) -> bool:
        """Note where the last step of a worker ends. Returns whether a further one has ended."""
        end = worker.text.rfind(self._step_end, worker.step_ends) if self._step_end else -1
        if end >= 0 and self._step_end:
            worker.step_ends = end + len(self._step_end)
        return end >= 0

    def _end(self, worker: GroupWorker, outcome: Result | EngineError) -> None:
        if isinstance(outcome, Result):
            self._complete(worker, outcome)
        else:
            worker.error = outcome
            if worker.sequence.scope.cancel_reason:
                self._close(worker, outcome)
        self._check()

    def _check(self) -> None:
        """Cut the workers that still run, if the others are enough."""
        if self._cut or not self._is_enough(self.workers):
            return
        self._cut = True
        for worker in self.workers:
            if worker.completion is None and worker.request:
                worker.sequence.scope.cancel("aborted", "policy")
                self._aborting.add(asyncio.create_task(self._engine.abort(worker.request.rid)))

    def _close(self, worker: GroupWorker, error: EngineError | None) -> None:
        """End a worker that was cut, or that failed. The others saw its tokens, so they stay."""
        scope = worker.sequence.scope
        if scope.cancel_reason is None:
            if error and self._requests.options.on_branch_failure == "raise":
                raise error
            log.warning("worker %s failed, and is skipped: %s", worker.sequence.identity, error)
            scope.cancel("failed")
        elif scope.reason != "failed":
            self._log.record_limit(scope.limit, worker.sequence.path)
        self._complete(worker, None)

    def _complete(self, worker: GroupWorker, result: Result | None) -> None:
        """Append what a worker has decoded to its branch, and end the branch."""
        sequence, stream, tokenizer = worker.sequence, worker.stream, self._requests.tokenizer
        assert worker.request is not None
        ids = result.token_ids if result else tuple(stream.received_ids)
        has_eos = bool(ids) and ids[-1] in tokenizer.eos_ids
        own = ids[:-1] if has_eos else ids
        finish: Finish = "stop"
        if result is None:
            finish = sequence.scope.cancel_reason or "aborted"
        elif result.finish == "length":
            finish, limit = "length", lowest(worker.limits)[0]
            if limit != PROMPT_LIMIT:
                self._log.record_limit(limit, sequence.path)
        elif has_eos:
            finish = "stop" if worker.prompt.ends_with_eos else "eos"
        prompt = len(worker.request.input_ids)
        header = prompt - len(self._session.root.sequence.context)
        received = result or Result(ids, "length", prompt, None)
        call = self._log.record_request(
            "branch", sequence.path, received, header, self._started, worker.seed, self._attempts - 1
        )
        text = tokenizer.decode(own, sequence.context)
        output = free_text_output(sequence, None, text, own, finish, tokenizer)
        before = sequence.tokens_used
        sequence.append_output(output, call)
        logprob = fmean(result.logprobs) if result and result.logprobs else None
        worker.text = text
        self._find_step_end(worker)
        worker.completion = Completion(sequence, self._engine, text, finish, logprob)
        stream.finish(output)
        written = sequence.tokens_used - before
        self._reserved -= written
        self._requests.release_tokens(written)
        self._group.end(sequence)
