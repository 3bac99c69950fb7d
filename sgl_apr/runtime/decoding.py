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

from sgl_apr.budget import lead_chars
from sgl_apr.dialects import Phase, Place
from sgl_apr.engine.base import Engine, Load, Request, Result
from sgl_apr.errors import EngineError
from sgl_apr.lowering import Fork
from sgl_apr.runtime.pacing import Demand
from sgl_apr.runtime.plan import Plan
from sgl_apr.runtime.record import Ahead, Record, Strand
from sgl_apr.runtime.scope import Cut
from sgl_apr.runtime.steps import Step, interpret
from sgl_apr.runtime.stitches import LOST, Stitches
from sgl_apr.runtime.stream import TextStream

T = TypeVar("T")
LOAD_S = 1.0  # how long a fork waits to hear how busy the engine is
log = logging.getLogger(__name__)


class Decoder:
    """Asks engines on behalf of the strands of one trajectory; the ids of its requests begin with `rid`.

    A strand whose scope is over is asked nothing more, and the scope of a lenient one ends when the engine
    fails it.
    """

    def __init__(self, engine: Engine, plan: Plan, record: Record, rid: str, seed: int) -> None:
        self.plan, self.record, self.rid, self.seed = plan, record, rid, seed
        self.dialect, self.tokenizer = plan.dialect, engine.tokenizer
        self.backend, self.seeded = engine.grammar_backend, engine.seeded
        self.stitches = Stitches(record, self.new_rid)

    async def decode(
        self,
        engine: Engine | None,
        strand: Strand,
        phase: Phase,
        new: int,
        room: tuple[int, str],
        shape: tuple[int, Fork],
    ) -> tuple[Step, int | None]:
        """What one phase came to, and the number of its call; no request where nothing may be decoded.

        `new` tokens of its context are unknown to the engine yet; `room` is how many it may decode, and the
        limit they come from; `shape` how wide a fork may be, and whether it has to come.
        """
        (tokens, limit), place, context = room, self.place(strand), strand.context
        stream = TextStream(self.tokenizer, context, self.record.writer(strand))
        result, call = None, None
        if engine and tokens > 0 and not strand.scope.over:
            request = self._request(strand, phase, place, tokens, shape)
            result, call = await self.ask(engine, strand, phase, new, request, stream)
        cut = strand.scope.over if result is None else None
        if cut is None and (result is None or result.finish == "length"):
            cut = "length"
        ids = tuple(stream.heard) if result is None else result.token_ids
        step = interpret(self.dialect, phase, place, context, ids, cut, self.tokenizer)
        if cut == "length":
            self.record.limit(limit, strand)
        elif cut in ("timeout", "aborted") and step.finish == cut:
            self.record.limit(strand.scope.limit, strand)
        stream.finish(step)
        return step, call

    async def ask(
        self, engine: Engine, strand: Strand, phase: str, new: int, request: Request, stream: TextStream
    ) -> tuple[Result | None, int]:
        """What came back, or None if it was cut or failed, and the number of the call, which is noted as of `phase`."""
        seed = derived(self.seed, strand.path, strand.requests)
        strand.requests += 1
        if self.seeded:
            request = replace(request, sampling={**request.sampling, "sampling_seed": seed})
        started = time.monotonic()

        async def once(request: Request) -> Result:
            self.record.void(strand, stream.void())
            return await engine.decode(request, stream)

        result, retries = await self._within(
            strand, lambda: self.stitches.send(engine, strand, strand.purse, request, once)
        )
        if strand.scope.reason == "failed":
            self.record.void(strand, stream.void())
        known = result or Result(tuple(stream.heard), "length", len(request.input_ids), None)
        name = "branch" if strand.path else phase
        return result, self.record.call(name, strand.path, known, new, started, seed, retries)

    async def fork(
        self, engine: Engine, strand: Strand, size: int, new: int | None = None
    ) -> tuple[Sequence[Engine], Load | None]:
        """An engine for each of `size` branches behind what `strand` has written, and how busy it is.

        `new` tokens of that are unknown to the engine yet, None: those injected last. No engines where nothing may
        be asked any more: such branches can only be closed.
        """
        if strand.scope.over or strand.purse.calls < 1:
            return (), None
        new, started = self.record.unknown(strand) if new is None else new, time.monotonic()
        load = asyncio.create_task(self.load(engine, strand)) if self.plan.pacing and size > 1 else None
        try:
            prefix = self._prompt(strand)

            async def once(request: Request) -> tuple[Result, Sequence[Engine]]:
                return await engine.fork(request, size)

            forked, retries = await self._within(
                strand, lambda: self.stitches.send(engine, strand, strand.purse, prefix, once)
            )
            committed, engines = forked or (Result((), "length", len(strand.context), None), ())
            self.record.call("commit", strand.path, committed, new, started, None, retries)
            return engines, await load if load and engines else None
        finally:
            if load:
                load.cancel()

    def at_once(self, strand: Strand, size: int, tokens: int, load: Load | None) -> int:
        """How many branches of so many tokens run at once; why is noted with the trajectory."""
        if self.plan.pacing is None or load is None:
            return size
        at_once, reason = self.plan.pacing(Demand(size, tokens), load)
        at_once = max(1, min(size, at_once))
        self.record.decide(strand, strand.blocks, size, at_once, load, reason)
        return at_once

    async def commit(self, engine: Engine, strand: Strand, branch: Strand) -> None:
        """Bring all of a branch of `strand` that has ended into the cache, so that it can be joined there.

        The strand pays. Where nothing may be asked, or the engine fails, the branch stays uncommitted.
        """
        if strand.scope.over or strand.purse.calls < 2:
            return
        new, started = max(1, self.record.unknown(branch)), time.monotonic()
        prompt = self._prompt(branch)
        result, retries = await self._within(
            strand,
            lambda: self.stitches.send(engine, branch, strand.purse, prompt, engine.commit),
            lenient=True,
        )
        if result:
            branch.committed = True
            self.record.call("commit", branch.path, result, new, started, None, retries)

    async def load(self, engine: Engine, strand: Strand) -> Load | None:
        """How busy the engine is, or None if it does not say so in time."""
        left = strand.scope.left()
        try:
            async with asyncio.timeout(LOAD_S if left is None else min(LOAD_S, left)):
                return await engine.load()
        except (EngineError, TimeoutError) as error:
            log.info("%s: the load of the engine is not known (%r)", self.rid, error)
            return None

    async def _within(
        self, strand: Strand, attempt: Callable[[], Awaitable[T]], lenient: bool = False
    ) -> tuple[T | None, int]:
        """What `attempt` returns, or None if it was cut or failed for good; and how often it was repeated.

        lenient: a failure has no consequences here.
        """
        tries = 0

        async def once() -> T:
            nonlocal tries
            tries += 1
            strand.purse.calls -= 1
            return await attempt()

        try:
            found = await strand.scope.within(self.plan.retry(once, lambda: strand.purse.calls > 0))
        except Cut:
            found = None
        except EngineError as error:
            spent = error.status == LOST and strand.purse.calls < 1  # it could be had again, with more calls
            if spent:
                self.record.limit("calls", strand)
            if spent or lenient:
                log.info("%s: %s", self.rid, error)
                return None, max(0, tries - 1)
            if not strand.lenient:
                raise
            log.warning("%s: branch %s failed, and is skipped: %s", self.rid, strand.name, error)
            strand.scope.stop("failed")
            found = None
        return found, max(0, tries - 1)

    def place(self, strand: Strand) -> Place:
        """Where the next phase of a strand decodes."""
        if self.dialect.asynchronous and not strand.path:
            ahead = strand.ahead or Ahead()
            next_ = str(self.dialect.first + (ahead.forked if ahead.running else 0))
            return Place(number=next_, waiting=tuple(ahead.running))
        prefix = f"{strand.number}." if strand.path and self.dialect.hierarchical else ""
        return Place(prefix=prefix, number=strand.number)

    def _request(
        self, strand: Strand, phase: Phase, place: Place, tokens: int, shape: tuple[int, Fork]
    ) -> Request:
        plan, dialect, grammar, (width, fork) = self.plan, self.dialect, None, shape
        if plan.constrain:
            grammar = dialect.lower(
                phase,
                self.tokenizer,
                self.backend,
                width=max(width, plan.least),
                min_width=plan.least,
                fork="auto" if dialect.rule_of(phase) == "body" else fork,
                prefix=place.prefix,
                number=place.number,
                waiting=place.waiting,
                lead_chars=lead_chars(tokens) if fork == "required" else None,
                outline_chars=plan.budget.outline_chars,
                plain=plan.plain,
            )
        stops = dialect.stops(phase, place)
        special = [self.tokenizer.special(tag) for tag in stops]
        return Request(
            self.rid,
            strand.context,
            fields=plan.fields,
            max_tokens=tokens,
            sampling=plan.sampling,
            logprobs=plan.logprobs,
            grammar=grammar,
            stop_ids=tuple(i for i in special if i is not None),
            stop=tuple(t for t, i in zip(stops, special, strict=True) if i is None),
        )

    def _prompt(self, strand: Strand) -> Request:
        """A request for what a strand has so far; `stitches` gives it its layout."""
        return Request(self.rid, strand.context, fields=self.plan.fields)

    def new_rid(self) -> str:
        """A request id of its own for every attempt, all of one length: the server aborts by prefix."""
        return f"{self.rid}-{uuid.uuid4().hex[:12]}"


def derived(seed: int, *where: object) -> int:
    """The seed of a strand's n-th request, say: the same wherever and whenever that is made; 31 bits."""
    digest = blake2b(" ".join(map(str, (seed, *where))).encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF
