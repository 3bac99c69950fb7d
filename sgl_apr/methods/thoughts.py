"""What programs of a fixed structure are written in: thoughts that follow a prompt or one another, in one trajectory."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

from sgl_apr.blocks import outcome
from sgl_apr.budget import Budget
from sgl_apr.engine.base import Engine, Request
from sgl_apr.errors import BudgetExceeded
from sgl_apr.runtime.branches import first
from sgl_apr.runtime.decoding import Decoder
from sgl_apr.runtime.events import Ended, Forked, Joined, OnEvent
from sgl_apr.runtime.joins import Policy, enough
from sgl_apr.runtime.plan import plan
from sgl_apr.runtime.purse import Purse
from sgl_apr.runtime.record import Record, Strand
from sgl_apr.runtime.scope import Cut, Scope
from sgl_apr.runtime.steps import Piece, Step
from sgl_apr.runtime.stream import TextStream
from sgl_apr.spans import Finish, Role
from sgl_apr.trajectory import Trajectory

T = TypeVar("T")
Begun = tuple[
    tuple[int, ...], tuple[int, ...], tuple[int, ...], "Ask"
]  # context, tip, after, and what is asked


@dataclass(frozen=True)
class Ask:
    """What one thought is asked: `text` is written first, then the model goes on.

    tokens: decoded at most; None leaves it to the budget. grammar: for the engine's grammar backend. stop: texts
    that end it, and stay in it. sampling: SGLang's parameters, over those of the run. name: for people. after: what
    it comes behind without seeing it, where it has a context of its own.
    """

    text: str = ""
    tokens: int | None = None
    grammar: str | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    after: tuple[Thought, ...] = ()

    @property
    def behind(self) -> Ask:
        """The same where the text is there already."""
        return replace(self, text="")


@dataclass(frozen=True)
class Thought:
    """What a model wrote when it was asked, and where that stands.

    text: decoded, without an end of text. logprob: the mean over its tokens, None if there are none.
    """

    strand: Strand
    engine: Engine | None
    text: str = ""
    finish: Finish = "stop"
    logprob: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it ended by itself."""
        return self.finish in ("stop", "eos")


class Thoughts:
    """One run of a method under one budget: what is asked together runs at once behind one committed prefix.

    Options are those of `areason` that concern requests (retry, failed, pacing, seed, logprobs, temperature, ...).
    A budget's `width` limits what runs at once, `branch_tokens` what one thought may decode; its depth, blocks and
    outlines are for models that fork by themselves. Use `thinking`, which cleans up.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: str | Sequence[int],
        method: str,
        *,
        budget: Budget | None = None,
        on_event: OnEvent | None = None,
        **options: Any,
    ) -> None:
        self.engine, self.tokenizer, self.method = engine, engine.tokenizer, method
        self.budget = budget or Budget()
        self.plan = plan(None, self.tokenizer, budget=self.budget, **{"logprobs": True, **options})
        self.record = Record(self.tokenizer, on_event)
        self.rid = f"apr-{uuid.uuid4().hex}"
        self.seed = self.plan.seed if self.plan.seed is not None else random.getrandbits(31)
        self.decoder = Decoder(engine, self.plan, self.record, self.rid, self.seed)
        self.purse = Purse.of(self.budget)
        self.reserved = 0  # tokens that requests under way may still write
        self._known = list[tuple[int, ...]]()  # what the engine has computed
        self._within = dict[
            int, list[tuple[int, Strand]]
        ]()  # branches of each strand, and before which of its spans
        self._forked = list[Engine]()
        ids = tuple(self.tokenizer.encode(prompt, first=True)) if isinstance(prompt, str) else tuple(prompt)
        if engine.context is not None and len(ids) >= engine.context:
            raise BudgetExceeded(
                f"the prompt has {len(ids)} tokens, expected fewer than the {engine.context} of the engine's context"
            )
        seconds = self.budget.seconds
        deadline = asyncio.get_running_loop().time() + seconds if seconds is not None else None
        self.root = Thought(self.record.trunk(ids, self.purse, Scope(None, deadline, "seconds")), engine)

    async def follow(self, thought: Thought, ask: Ask | str = "") -> Thought:
        """Let a thought go on: it is asked in its own context."""
        ask = self._ask(ask)
        thought.strand.after = self._tips(ask.after) if ask.after else ()
        self._write(thought.strand, ask.text)
        (tokens,) = self._reserve([ask])
        return await self._decode(thought.engine, thought.strand, ask, tokens)

    async def fork(
        self, thought: Thought, asks: Sequence[Ask | str], *, of: float = 1.0, policy: Policy = "all"
    ) -> list[Thought]:
        """Thoughts that follow one, at once, each in a context of its own behind it; in their order.

        `of` is the share of what is left of the budget that they may take. Those that `policy` cuts are there too,
        as they were, and those that failed, with no text.
        """
        strand = thought.strand
        begun = self._begin(strand, [(strand.context, strand.tip, (), self._ask(ask)) for ask in asks])
        return await self._run(thought, begun, of, policy)

    async def apart(
        self,
        asks: Sequence[Ask | str],
        *,
        of: float = 1.0,
        policy: Policy = "all",
        at: Thought | None = None,
    ) -> list[Thought]:
        """Thoughts that see nothing but what each is asked, at once. `at`: the thought that goes on behind them."""
        at = at or self.root
        return await self._run(at, self._begin(at.strand, self._apart(asks)), of, policy)

    async def open(self, asks: Sequence[Ask | str], *, at: Thought | None = None) -> list[Thought]:
        """Contexts of their own with what each is asked, behind which nothing is decoded yet: to go on there."""
        at = at or self.root
        begun = self._begin(at.strand, self._apart(asks))
        engines, _ = await self._forks(at, begun, 0)
        opened = [Thought(branch, engines[k] if engines else None) for k, (branch, _) in enumerate(begun)]
        self._joined(begun, opened)
        return opened

    async def samples(self, asks: Sequence[Ask], n: int, *, of: float = 1.0) -> list[list[Thought]]:
        """`n` thoughts behind each of several contexts of their own, all at once; by context, in their order."""
        opened = await self.open(asks)
        share = int((self.purse.tokens - self.reserved) * of) // max(1, len(asks) * n)
        every = [replace(a.behind, tokens=share if a.tokens is None else min(share, a.tokens)) for a in asks]
        forks = (self.fork(one, [ask] * n) for one, ask in zip(opened, every, strict=True))
        return await together(forks)

    async def seeing(
        self, contexts: Sequence[tuple[str, Sequence[Thought], Ask]], *, of: float = 1.0
    ) -> list[Thought]:
        """Thoughts behind any text, at once, each with the thoughts that the text shows, whose copies are not counted."""
        found = [
            (tuple(self.tokenizer.encode(text, first=True)), self._tips(shown), (), ask)
            for text, shown, ask in contexts
        ]
        return await self._run(self.root, self._begin(self.root.strand, found), of, "all")

    async def within(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What something else than the engine comes to; None if the time is up before."""
        try:
            return await self.root.strand.scope.within(work)
        except Cut:
            return None

    def width(self, wanted: int, need: int = 1, of: float = 1.0, calls: int = 1) -> int:
        """How many of so many wanted thoughts the budget bears, if each is to get so many tokens and calls; at least one."""
        bears = [wanted, max(1, int((self.purse.tokens - self.reserved) * of) // max(1, need))]
        limits = ["", "tokens"]
        if self.budget.width is not None:
            bears.append(self.budget.width)
            limits.append("width")
        if self.budget.calls is not None:
            bears.append(max(1, (self.purse.calls - 1) // calls))
            limits.append("calls")
        least = min(bears)
        if least < wanted:
            self.record.limit(limits[bears.index(least)], self.root.strand)
        return least

    def finish(self) -> Trajectory:
        """All that was thought; the last thing to be asked for."""
        strand = self.root.strand
        strand.order = list(self._order(strand))
        return self.record.finish(strand, self.method, self.seed, self.decoder.seeded)

    async def release(self) -> None:
        """Give the engine back what was forked."""
        for engine in self._forked:
            await engine.release()

    def _ask(self, ask: Ask | str) -> Ask:
        return Ask(ask) if isinstance(ask, str) else ask

    def _tips(self, thoughts: Sequence[Thought]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(t for thought in thoughts or [self.root] for t in thought.strand.tip))

    def _apart(self, asks: Sequence[Ask | str]) -> list[Begun]:
        return [((), (), self._tips(ask.after), ask) for ask in map(self._ask, asks)]

    def _order(self, strand: Strand) -> Sequence[int]:
        """The spans of a strand with those of its branches where they were forked: parents come first."""
        inside, found, at = self._within.get(id(strand), []), list[int](), 0
        for before, branch in inside:
            found += strand.order[at:before]
            found += self._order(branch)
            at = before
        return [*found, *strand.order[at:]]

    def _reserve(self, asks: Sequence[Ask], of: float = 1.0) -> list[int]:
        """An equal share of what is left for each, no more than it asks for, set aside until `_decode` gives it back."""
        share = max(0, int((self.purse.tokens - self.reserved) * of) // len(asks))
        tokens = [share if ask.tokens is None else min(share, ask.tokens) for ask in asks]
        self.reserved += sum(tokens)
        return tokens

    def _write(self, strand: Strand, text: str) -> None:
        """What a thought is asked, if there is room for it: else nothing can be decoded behind it either."""
        if len(self.tokenizer.encode(text)) < self.purse.tokens - self.reserved:
            role: Role = "text" if not strand.path else "body" if strand.order else "header"
            self.record.inject(strand, role, text, label=strand.outline if role == "header" else "")
        elif text:
            strand.scope.stop("length", "tokens")

    def _begin(self, strand: Strand, begun: Sequence[Begun]) -> list[tuple[Strand, Ask]]:
        """The branches of a fork of `strand`, with what each is asked."""
        if not begun:
            return []
        strand.blocks += 1
        block = (*strand.path, strand.blocks)
        self.record.tell(Forked(block, tuple((f"{k}", ask.name) for k, (*_, ask) in enumerate(begun, 1))))
        outer, branches = Scope(strand.scope), list[tuple[Strand, Ask]]()
        for k, (context, tip, after, ask) in enumerate(begun, 1):
            branch = Strand(
                (*block, k), context, tip, self.purse, Scope(outer), number=f"{k}", outline=ask.name, after=after,
                lenient=self.plan.failed != "raise",
            )  # fmt: skip
            self._within.setdefault(id(strand), []).append((len(strand.order), branch))
            self._write(branch, ask.text)
            branch.after = () if branch.order else after
            branches.append((branch, ask))
        return branches

    async def _run(
        self, thought: Thought, begun: Sequence[tuple[Strand, Ask]], of: float, policy: Policy
    ) -> list[Thought]:
        """Let branches decode, at once or as paced, until enough of them have ended; the others are cut."""
        if not begun:
            return []
        tokens = self._reserve([ask for _, ask in begun], of)
        engines, at_once = await self._forks(thought, begun, max(tokens))
        gate, ended, done = asyncio.Semaphore(at_once), list[Thought](), enough(policy, len(begun))

        async def run(k: int, branch: Strand, ask: Ask) -> Thought:
            async with gate:
                found = await self._decode(engines[k] if engines else None, branch, ask, tokens[k])
            if found.finish != "failed":
                ended.append(found)
            if len(ended) < len(begun) and done([self.record.branch(t.strand) for t in ended]):
                for other, _ in begun:
                    if all(t.strand is not other for t in ended):
                        other.scope.stop("aborted", "policy")
            return found

        found = await together(run(k, branch, ask) for k, (branch, ask) in enumerate(begun))
        self._joined(begun, found)
        return found

    def _joined(self, begun: Sequence[tuple[Strand, Ask]], found: Sequence[Thought]) -> None:
        for thought in found:
            self.record.tell(Ended(thought.strand.path, outcome(thought.finish) or "ok"))
        if begun:
            block = begun[0][0].path[:-1]
            self.record.tell(Joined(block, tuple(branch.path[-1] for branch, _ in begun)))

    async def _forks(
        self, thought: Thought, begun: Sequence[tuple[Strand, Ask]], tokens: int
    ) -> tuple[Sequence[Engine], int]:
        """An engine for each, behind what all have in common. That is committed first; where it is not what one thought
        has come to, only if it is not known yet."""
        engine, size = thought.engine, len(begun)
        if engine is None or not begun:
            return (), size
        prefix = common([branch.context for branch, _ in begun])
        new = self._new(prefix) if prefix else 0
        if size == 1 or not prefix or (new <= 1 and prefix != thought.strand.context):
            return [engine] * size, size
        shared = replace(thought.strand, context=prefix, order=[], joined=())
        engines, load = await self.decoder.fork(engine, shared, size, new)
        self._known.append(prefix)
        self._forked += engines
        return engines, self.decoder.at_once(thought.strand, size, tokens, load)

    async def _decode(self, engine: Engine | None, strand: Strand, ask: Ask, tokens: int) -> Thought:
        """One request, of at most the `tokens` reserved for it, which are given back."""
        limits = {"tokens": tokens}
        if ask.tokens is not None:
            limits["asked"] = ask.tokens
        if strand.path and self.budget.branch_tokens is not None:
            limits["branch_tokens"] = self.budget.branch_tokens
        limits["critical_tokens"] = self.purse.cap - self.record.reach(strand)
        if self.engine.context is not None:
            limits["context"] = self.engine.context - len(strand.context)
        limit = min(limits, key=limits.__getitem__)
        most = limits[limit]
        try:
            if self.purse.calls < 1:
                limit, most = "calls", 0
            if engine is None or most < 1 or strand.scope.over:
                return self._cut(strand, engine, limit if most < 1 else strand.scope.limit)
            return await self._asked(engine, strand, ask, most, limit)
        finally:
            self.reserved -= tokens

    def _cut(self, strand: Strand, engine: Engine | None, limit: str) -> Thought:
        self.record.limit(limit, strand)
        finish: Finish = strand.scope.over or "length"
        self.record.append(strand, Step((Piece(self._role(strand), "decoded", "", ()),), finish), None)
        return Thought(strand, engine, "", finish)

    def _role(self, strand: Strand) -> Role:
        return "body" if strand.path else "text"

    async def _asked(self, engine: Engine, strand: Strand, ask: Ask, most: int, limit: str) -> Thought:
        special = [self.tokenizer.special(tag) for tag in ask.stop]
        request = Request(
            self.rid,
            strand.context,
            most,
            {**self.plan.sampling, **ask.sampling},
            ask.grammar,
            tuple(i for i in special if i is not None),
            tuple(t for t, i in zip(ask.stop, special, strict=True) if i is None),
            logprobs=self.plan.logprobs,
            fields=self.plan.fields,
        )
        stream = TextStream(self.tokenizer, strand.context, self.record.writer(strand))
        result, call = await self.decoder.ask(
            engine, strand, "ask", self._new(strand.context), request, stream
        )
        ids = result.token_ids if result else tuple(stream.heard)
        ended = bool(ids) and ids[-1] in self.tokenizer.eos_ids
        own = ids[:-1] if ended else ids
        finish: Finish = "stop"
        if result is None:
            finish = strand.scope.over or "aborted"
            if finish != "failed":
                self.record.limit(strand.scope.limit, strand)
        elif result.finish == "length":
            finish = "length"
            if limit != "asked":
                self.record.limit(limit, strand)
        elif ended:
            finish = "eos"
        if finish == "failed":
            own = ()
        self._known.append((*strand.context, *own[:-1]))
        text = self.tokenizer.decode(own, strand.context)
        step = Step((Piece(self._role(strand), "decoded", text, own),), finish)
        self.record.append(strand, step, call)
        stream.finish(step)
        logprobs = result.logprobs if result else None
        return Thought(strand, engine, text, finish, fmean(logprobs) if logprobs else None)

    def _new(self, ids: tuple[int, ...]) -> int:
        """How many of these no request has computed yet; the last is always computed again."""
        return len(ids) - max((len(common([ids, known])) for known in self._known), default=0)


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What several come to that run at once; the first failure cancels the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:  # the group has cancelled and awaited the others
        raise first(failed) from first(failed).__cause__
    return [task.result() for task in tasks]


def common(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of them begin with.

    >>> common([(1, 2, 3), (1, 2), (1, 2, 4)])
    (1, 2)
    """
    low, high = min(sequences), max(sequences)  # all others lie between, and share what these do
    same = next(
        (k for k, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high))
    )
    return low[:same]


@asynccontextmanager
async def thinking(
    engine: Engine,
    prompt: str | Sequence[int],
    method: str,
    **options: Any,
) -> AsyncIterator[Thoughts]:
    """Thoughts whose requests are aborted if anything fails, and whose forks are given back."""
    run = Thoughts(engine, prompt, method, **options)
    try:
        yield run
    except BaseException:
        await asyncio.shield(engine.abort(run.rid))
        raise
    finally:
        await run.release()
