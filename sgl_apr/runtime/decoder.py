"""The requests of one trajectory: made, repeated, cut and noted; what is to be decoded is decided elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TypeVar

from sgl_apr.engine.base import Engine, Load, Request, Result
from sgl_apr.errors import EngineError
from sgl_apr.formats.dialects import BranchNumbering, Phase
from sgl_apr.formats.masks.writer import Fork
from sgl_apr.runtime.budget import lead_chars
from sgl_apr.runtime.cancel_scope import ScopeCancelled
from sgl_apr.runtime.detokenizer import IncrementalDetokenizer
from sgl_apr.runtime.kv_join import CACHE_MISS_STATUS, KvJoiner
from sgl_apr.runtime.options import ReasonOptions
from sgl_apr.runtime.pacing import Demand
from sgl_apr.runtime.phase_output import PhaseOutput, parse_phase_output
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import PendingBranches, SequenceState

T = TypeVar("T")
LOAD_TIMEOUT_S = 1.0  # how long a fork waits to hear how busy the engine is
log = logging.getLogger(__name__)


class RequestRunner:
    """Asks engines on behalf of the sequences of one trajectory; the ids of its requests begin with `rid`.

    A sequence whose scope is over is asked nothing more, and the scope of a lenient one ends when the engine
    fails it.
    """

    def __init__(
        self, engine: Engine, plan: ReasonOptions, record: TrajectoryRecorder, rid: str, seed: int
    ) -> None:
        self.plan, self.record, self.rid, self.seed = plan, record, rid, seed
        self.dialect, self.tokenizer = plan.dialect, engine.tokenizer
        self.backend, self.supports_seeds = engine.grammar_backend, engine.supports_seeds
        self.kv_joiner = KvJoiner(record, self.new_rid)

    async def decode(
        self,
        engine: Engine | None,
        sequence: SequenceState,
        phase: Phase,
        new: int,
        room: tuple[int, str],
        shape: tuple[int, Fork],
    ) -> tuple[PhaseOutput, int | None]:
        """What one phase came to, and the number of its call; no request where nothing may be decoded.

        `new` tokens of its context are unknown to the engine yet; `room` is how many it may decode, and the
        limit they come from; `shape` how wide a fork may be, and whether it has to come.
        """
        (tokens, limit), place, context = room, self.branch_numbering(sequence), sequence.context
        stream = IncrementalDetokenizer(self.tokenizer, context, self.record.delta_callback(sequence))
        result, call = None, None
        if engine and tokens > 0 and not sequence.scope.cancel_reason:
            request = self._request(sequence, phase, place, tokens, shape)
            result, call = await self.send_request(engine, sequence, phase, new, request, stream)
        cut = sequence.scope.cancel_reason if result is None else None
        if cut is None and (result is None or result.finish == "length"):
            cut = "length"
        ids = tuple(stream.received_ids) if result is None else result.token_ids
        step = parse_phase_output(self.dialect, phase, place, context, ids, cut, self.tokenizer)
        if cut == "length":
            self.record.record_limit(limit, sequence)
        elif cut in ("timeout", "aborted") and step.finish == cut:
            self.record.record_limit(sequence.scope.limit, sequence)
        stream.finish(step)
        return step, call

    async def send_request(
        self,
        engine: Engine,
        sequence: SequenceState,
        phase: str,
        new: int,
        request: Request,
        stream: IncrementalDetokenizer,
    ) -> tuple[Result | None, int]:
        """What came back, or None if it was cut or failed, and the number of the call, which is noted as of `phase`."""
        seed = derive_seed(self.seed, sequence.path, sequence.requests)
        sequence.requests += 1
        if self.supports_seeds:
            request = replace(request, sampling={**request.sampling, "sampling_seed": seed})
        started = time.monotonic()

        async def once(request: Request) -> Result:
            self.record.retract_text(sequence, stream.reset())
            return await engine.decode(request, stream)

        result, retries = await self._run_with_retries(
            sequence, lambda: self.kv_joiner.send(engine, sequence, sequence.allowance, request, once)
        )
        if sequence.scope.reason == "failed":
            self.record.retract_text(sequence, stream.reset())
        known = result or Result(tuple(stream.received_ids), "length", len(request.input_ids), None)
        name = "branch" if sequence.path else phase
        return result, self.record.record_request(name, sequence.path, known, new, started, seed, retries)

    async def fork(
        self, engine: Engine, sequence: SequenceState, size: int, new: int | None = None
    ) -> tuple[Sequence[Engine], Load | None]:
        """An engine for each of `size` branches behind what `sequence` has written, and how busy it is.

        `new` tokens of that are unknown to the engine yet, None: those injected last. No engines where nothing may
        be asked any more: such branches can only be closed.
        """
        if sequence.scope.cancel_reason or sequence.allowance.calls < 1:
            return (), None
        new, started = self.record.uncached_tokens(sequence) if new is None else new, time.monotonic()
        load = asyncio.create_task(self.load(engine, sequence)) if self.plan.pacing and size > 1 else None
        try:
            prefix = self._prompt(sequence)

            async def once(request: Request) -> tuple[Result, Sequence[Engine]]:
                return await engine.fork(request, size)

            forked, retries = await self._run_with_retries(
                sequence, lambda: self.kv_joiner.send(engine, sequence, sequence.allowance, prefix, once)
            )
            committed, engines = forked or (Result((), "length", len(sequence.context), None), ())
            self.record.record_request("commit", sequence.path, committed, new, started, None, retries)
            return engines, await load if load and engines else None
        finally:
            if load:
                load.cancel()

    def choose_parallelism(self, sequence: SequenceState, size: int, tokens: int, load: Load | None) -> int:
        """How many branches of so many tokens run at once; why is noted with the trajectory."""
        if self.plan.pacing is None or load is None:
            return size
        at_once, reason = self.plan.pacing(Demand(size, tokens), load)
        at_once = max(1, min(size, at_once))
        self.record.record_pacing(sequence, sequence.blocks, size, at_once, load, reason)
        return at_once

    async def commit(self, engine: Engine, sequence: SequenceState, branch: SequenceState) -> None:
        """Bring all of a branch of `sequence` that has ended into the cache, so that it can be joined there.

        The sequence pays. Where nothing may be asked, or the engine fails, the branch stays uncommitted.
        """
        if sequence.scope.cancel_reason or sequence.allowance.calls < 2:
            return
        new, started = max(1, self.record.uncached_tokens(branch)), time.monotonic()
        prompt = self._prompt(branch)
        result, retries = await self._run_with_retries(
            sequence,
            lambda: self.kv_joiner.send(engine, branch, sequence.allowance, prompt, engine.commit),
            lenient=True,
        )
        if result:
            branch.committed = True
            self.record.record_request("commit", branch.path, result, new, started, None, retries)

    async def load(self, engine: Engine, sequence: SequenceState) -> Load | None:
        """How busy the engine is, or None if it does not say so in time."""
        left = sequence.scope.remaining_seconds()
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S if left is None else min(LOAD_TIMEOUT_S, left)):
                return await engine.load()
        except (EngineError, TimeoutError) as error:
            log.info("%s: the load of the engine is not known (%r)", self.rid, error)
            return None

    async def _run_with_retries(
        self, sequence: SequenceState, attempt: Callable[[], Awaitable[T]], lenient: bool = False
    ) -> tuple[T | None, int]:
        """What `attempt` returns, or None if it was cut or failed for good; and how often it was repeated.

        lenient: a failure has no consequences here.
        """
        tries = 0

        async def once() -> T:
            nonlocal tries
            tries += 1
            sequence.allowance.calls -= 1
            return await attempt()

        try:
            found = await sequence.scope.run(self.plan.retry(once, lambda: sequence.allowance.calls > 0))
        except ScopeCancelled:
            found = None
        except EngineError as error:
            spent = (
                error.status == CACHE_MISS_STATUS and sequence.allowance.calls < 1
            )  # it could be had again, with more calls
            if spent:
                self.record.record_limit("calls", sequence)
            if spent or lenient:
                log.info("%s: %s", self.rid, error)
                return None, max(0, tries - 1)
            if not sequence.tolerate_failure:
                raise
            log.warning("%s: branch %s failed, and is skipped: %s", self.rid, sequence.name, error)
            sequence.scope.cancel("failed")
            found = None
        return found, max(0, tries - 1)

    def branch_numbering(self, sequence: SequenceState) -> BranchNumbering:
        """Where the next phase of a sequence decodes."""
        if self.dialect.asynchronous and not sequence.path:
            ahead = sequence.ahead or PendingBranches()
            next_ = str(self.dialect.first_number + (ahead.forked if ahead.running else 0))
            return BranchNumbering(number=next_, waiting=tuple(ahead.running))
        prefix = f"{sequence.number}." if sequence.path and self.dialect.nested_numbering else ""
        return BranchNumbering(prefix=prefix, number=sequence.number)

    def _request(
        self,
        sequence: SequenceState,
        phase: Phase,
        place: BranchNumbering,
        tokens: int,
        shape: tuple[int, Fork],
    ) -> Request:
        plan, dialect, grammar, (width, fork) = self.plan, self.dialect, None, shape
        if plan.constrain:
            grammar = dialect.lower(
                phase,
                self.tokenizer,
                self.backend,
                width=max(width, plan.min_branches),
                min_width=plan.min_branches,
                fork="auto" if dialect.rule_for_phase(phase) == "body" else fork,
                prefix=place.prefix,
                number=place.number,
                waiting=place.waiting,
                lead_chars=lead_chars(tokens) if fork == "required" else None,
                outline_chars=plan.budget.outline_chars,
                forbid_angle_brackets=plan.forbid_angle_brackets,
            )
        stops = dialect.stop_strings(phase, place)
        special = [self.tokenizer.special(tag) for tag in stops]
        return Request(
            self.rid,
            sequence.context,
            fields=plan.request_fields,
            max_tokens=tokens,
            sampling=plan.sampling,
            logprobs=plan.logprobs,
            grammar=grammar,
            stop_ids=tuple(i for i in special if i is not None),
            stop=tuple(t for t, i in zip(stops, special, strict=True) if i is None),
        )

    def _prompt(self, sequence: SequenceState) -> Request:
        """A request for what a sequence has so far; `joins` gives it its layout."""
        return Request(self.rid, sequence.context, fields=self.plan.request_fields)

    def new_rid(self) -> str:
        """A request id of its own for every attempt, all of one length: the server aborts by prefix."""
        return f"{self.rid}-{uuid.uuid4().hex[:12]}"


def derive_seed(seed: int, *where: object) -> int:
    """The seed of a sequence's n-th request, say: the same wherever and whenever that is made; 31 bits."""
    digest = blake2b(" ".join(map(str, (seed, *where))).encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF
