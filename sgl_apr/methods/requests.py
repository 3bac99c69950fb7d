"""The requests of one run of a method: within its budget, behind prefixes that are known; what is asked is not decided here."""

from __future__ import annotations

import random
import uuid
from bisect import bisect, insort
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from sgl_apr.engine.base import Engine, Request
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.runtime.allocation import Allowance
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.decoder import RequestRunner
from sgl_apr.runtime.detokenizer import IncrementalDetokenizer
from sgl_apr.runtime.events import OnEvent
from sgl_apr.runtime.options import make_options
from sgl_apr.runtime.phase_output import PhaseOutput, SpanDraft
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.trajectory.spans import Finish, Role


class Requests:
    """All sequences pay from one allowance; what a request may write is reserved before it is sent.

    Options are those of a `Plan` that concern requests.
    """

    def __init__(
        self, engine: Engine, budget: Budget | None, on_event: OnEvent | None, options: dict[str, Any]
    ) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.budget = budget or Budget()
        self.plan = make_options(None, self.tokenizer, budget=self.budget, **{"logprobs": True, **options})
        self.record = TrajectoryRecorder(self.tokenizer, on_event)
        self.rid = f"apr-{uuid.uuid4().hex}"
        self.seed = self.plan.seed if self.plan.seed is not None else random.getrandbits(31)
        self.decoder = RequestRunner(engine, self.plan, self.record, self.rid, self.seed)
        self.allowance = Allowance.of(self.budget)
        self._reserved = 0
        self._known = list[tuple[int, ...]]()  # what the engine has computed, in order
        self._forked = list[Engine]()

    @property
    def left(self) -> int:
        """Tokens that nobody has reserved."""
        return self.allowance.tokens - self._reserved

    def reserve(self, asks: Sequence[Prompt], of: float = 1.0, most: int | None = None) -> list[int]:
        """An equal share of what is left for each, `most` at most, and no more than it asks for; set aside until
        `decode` gives it back."""
        share = max(0, int(self.left * of) // len(asks))
        share = share if most is None else min(share, most)
        tokens = [share if ask.tokens is None else min(share, ask.tokens) for ask in asks]
        self._reserved += sum(tokens)
        return tokens

    def write(self, sequence: SequenceState, text: str) -> None:
        """What a thought is asked, if there is room for it: else nothing can be decoded behind it either."""
        if len(self.tokenizer.encode(text)) < self.left:
            role: Role = "text" if not sequence.path else "body" if sequence.span_order else "header"
            self.record.inject(sequence, role, text, label=sequence.outline if role == "header" else "")
        elif text:
            sequence.scope.cancel("length", "tokens")

    async def forks(
        self, thought: Completion, branches: Sequence[SequenceState], tokens: int
    ) -> tuple[Sequence[Engine], int]:
        """An engine for each, behind what all have in common. That is committed first; where it is not what one thought
        has come to, only if it is not known yet."""
        engine, size = thought.engine, len(branches)
        if engine is None or not branches:
            return (), size
        prefix = common([branch.context for branch in branches])
        new = self._new(prefix) if prefix else 0
        if size == 1 or not prefix or (new <= 1 and prefix != thought.sequence.context):
            return [engine] * size, size
        shared = replace(thought.sequence, context=prefix, span_order=[], kv_layout=())
        engines, load = await self.decoder.fork(engine, shared, size, new)
        insort(self._known, prefix)
        self._forked += engines
        return engines, self.decoder.choose_parallelism(thought.sequence, size, tokens, load)

    async def decode(
        self, engine: Engine | None, sequence: SequenceState, ask: Prompt, tokens: int
    ) -> Completion:
        """One request, of at most the `tokens` reserved for it, which are given back."""
        limits = (
            {} if ask.tokens is None else {"asked": ask.tokens}
        )  # first: where all is granted, nothing acts
        limits["tokens"] = tokens
        if sequence.path and self.budget.branch_tokens is not None:
            limits["branch_tokens"] = self.budget.branch_tokens
        limits["critical_tokens"] = self.allowance.critical_path_cap - self.record.critical_path_to(sequence)
        if self.engine.context is not None:
            limits["context"] = self.engine.context - len(sequence.context)
        limit = min(limits, key=limits.__getitem__)
        most = limits[limit]
        try:
            if self.allowance.calls < 1:
                limit, most = "calls", 0
            if engine is None or most < 1 or sequence.scope.cancel_reason:
                return self._cut(sequence, engine, limit if most < 1 else sequence.scope.limit)
            return await self._asked(engine, sequence, ask, most, limit)
        finally:
            self._reserved -= tokens

    def _cut(self, sequence: SequenceState, engine: Engine | None, limit: str) -> Completion:
        self.record.record_limit(limit, sequence)
        finish: Finish = sequence.scope.cancel_reason or "length"
        self.record.append(
            sequence, PhaseOutput((SpanDraft(self._role(sequence), "decoded", "", ()),), finish), None
        )
        return Completion(sequence, engine, "", finish)

    def _role(self, sequence: SequenceState) -> Role:
        return "body" if sequence.path else "text"

    async def _asked(
        self, engine: Engine, sequence: SequenceState, ask: Prompt, most: int, limit: str
    ) -> Completion:
        special = [self.tokenizer.special(tag) for tag in ask.stop]
        request = Request(
            self.rid,
            sequence.context,
            most,
            {**self.plan.sampling, **ask.sampling},
            ask.grammar,
            tuple(i for i in special if i is not None),
            tuple(t for t, i in zip(ask.stop, special, strict=True) if i is None),
            logprobs=self.plan.logprobs,
            fields=self.plan.request_fields,
        )
        stream = IncrementalDetokenizer(
            self.tokenizer, sequence.context, self.record.delta_callback(sequence)
        )
        result, call = await self.decoder.send_request(
            engine, sequence, "ask", self._new(sequence.context), request, stream
        )
        ids = result.token_ids if result else tuple(stream.received_ids)
        ended = bool(ids) and ids[-1] in self.tokenizer.eos_ids
        own = ids[:-1] if ended else ids
        finish: Finish = "stop"
        if result is None:
            finish = sequence.scope.cancel_reason or "aborted"
            if finish != "failed":
                self.record.record_limit(sequence.scope.limit, sequence)
        elif result.finish == "length":
            finish = "length"
            if limit != "asked":
                self.record.record_limit(limit, sequence)
        elif ended:
            finish = "eos"
        if finish == "failed":
            own = ()
        insort(self._known, (*sequence.context, *own[:-1]))
        text = self.tokenizer.decode(own, sequence.context)
        step = PhaseOutput((SpanDraft(self._role(sequence), "decoded", text, own),), finish)
        self.record.append(sequence, step, call)
        stream.finish(step)
        logprobs = result.logprobs if result else None
        return Completion(sequence, engine, text, finish, fmean(logprobs) if logprobs else None)

    def _new(self, ids: tuple[int, ...]) -> int:
        """How many of these no request has computed yet; the last is always computed again."""
        at = bisect(self._known, ids)  # in order, those next to it share most with it
        return len(ids) - max(
            (len(common([ids, known])) for known in self._known[max(0, at - 1) : at + 1]), default=0
        )

    async def release(self) -> None:
        """Give the engine back what was forked."""
        for engine in self._forked:
            await engine.release()


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
