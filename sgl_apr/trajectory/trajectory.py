"""The one noun: an immutable graph of spans, with blocks and branches as a view; it knows no grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from sgl_apr.errors import TraceError
from sgl_apr.trajectory.blocks import Block, iter_blocks
from sgl_apr.trajectory.calls import Call, JoinRecord, LimitHit, PacingDecision, call_from_json, with_path_tuple
from sgl_apr.trajectory.metrics import Convention, Metrics, compute_metrics
from sgl_apr.trajectory.spans import Finish, Span, ancestors, span_from_json

SCHEMA = "sgl_apr.trajectory/6"


@dataclass(frozen=True)
class Trajectory:
    """Everything that happened in one answer, spans in the order in which they stand in the text.

    `limits` and `decisions` say where the budget acted and how forks were paced, `joins` what became of the
    KV joins asked for, in the order in which it happened. The seeds of the calls are derived from `seed`;
    `seeds_honoured` says whether the engine honours them.

    >>> import sgl_apr as apr
    >>> t = apr.dialect("threadweaver").parse("six times seven is 42")
    >>> t.answer, t.blocks
    ('six times seven is 42', ())
    """

    spans: tuple[Span, ...]
    dialect: str
    calls: tuple[Call, ...] = ()
    wall_s: float = 0.0
    limits: tuple[LimitHit, ...] = ()
    decisions: tuple[PacingDecision, ...] = ()
    joins: tuple[JoinRecord, ...] = ()
    seed: int | None = None
    seeds_honoured: bool = False

    @property
    def prompt(self) -> str:
        """The text of the prompt spans."""
        return "".join(s.text for s in self.spans if s.origin == "prompt")

    @property
    def text(self) -> str:
        """The whole reply, tags and injected text included, prompt excluded.

        Of a branch that saw nothing but a message it holds the result alone, as the trunk does.
        """
        return "".join(s.text for s in self.reply_spans)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of `text`, in order, just as the engine was sent and returned them."""
        return tuple(i for s in self.reply_spans if s.tokens for i in s.token_ids or ())

    @property
    def reply_spans(self) -> tuple[Span, ...]:
        """The spans of `text`: the reply without branches that had a context of their own."""
        apart: list[bool] = []
        for span in self.spans:
            apart.append(all(apart[p] for p in span.parents) if span.parents else bool(span.waits_for))
        return tuple(s for s, own in zip(self.spans, apart, strict=True) if not own and s.origin != "prompt")

    @property
    def context_ids(self) -> tuple[int, ...]:
        """The ids that whatever comes next is conditioned on, prompt included: `text` without dropped calls."""
        document = set(map(id, self.reply_spans))
        last = max((i for i, s in enumerate(self.spans) if id(s) in document), default=len(self.spans) - 1)
        return tuple(t for i in self.ancestors(last) for t in self.spans[i].token_ids or ())

    def ancestors(self, index: int) -> list[int]:
        """What span `index` was conditioned on, and itself, in the order of the text."""
        return ancestors(self.spans, index)

    @property
    def reply(self) -> tuple[Span, ...]:
        """Every span but the prompt."""
        return tuple(s for s in self.spans if s.origin != "prompt")

    def with_prompt(self, prompt: str, token_ids: tuple[int, ...] | None = None) -> Trajectory:
        """The same reply behind a prompt; for a trajectory that has none."""

        def moved(indices: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(i + 1 for i in indices)

        first = Span("prompt", "prompt", prompt, token_ids, ())
        spans = (
            replace(
                s, parents=moved(s.parents) or (() if s.waits_for else (0,)), waits_for=moved(s.waits_for)
            )
            for s in self.spans
        )
        return replace(self, spans=(first, *spans))

    @property
    def finish(self) -> Finish | None:
        """How the trunk ended; `malformed` if its text left the dialect (possible with the grammar off)."""
        return next((s.finish for s in reversed(self.spans) if s.path == () and s.finish), None)

    @property
    def answer(self) -> str:
        """Trunk text after the last join (all of it if there was none), leading white space removed."""
        tail: list[str] = []
        for span in reversed(self.reply):
            if span.role != "text" or span.path != ():
                break
            tail.append(span.text)
        return "".join(reversed(tail)).lstrip()

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every block, outer before inner, in the order of the text."""
        return tuple(iter_blocks(self.spans))

    def metrics(self, convention: Convention = "causal") -> Metrics:
        """Tokens, critical path, parallelism and what the engine did: see `sgl_apr.trajectory.metrics`."""
        return compute_metrics(self.spans, self.calls, self.wall_s, convention)

    def to_json(self) -> str:
        """One JSON object with its schema version, read back by `from_json` without loss."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Trajectory:
        """The trajectory that `to_json` wrote; raises `TraceError` for anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise TraceError(error.lineno, error.colno, text[error.pos : error.pos + 20], ["JSON"]) from None
        found = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
        if found != SCHEMA:
            raise TraceError(1, 1, f"schema {found!r}", [f"schema {SCHEMA!r}"])
        try:
            trajectory = cls(
                spans=tuple(span_from_json(s, i) for i, s in enumerate(data["spans"])),
                dialect=str(data["dialect"]),
                calls=tuple(call_from_json(c) for c in data["calls"]),
                wall_s=float(data["wall_s"]),
                limits=tuple(LimitHit(**with_path_tuple(x)) for x in data["limits"]),
                decisions=tuple(PacingDecision(**with_path_tuple(d)) for d in data["decisions"]),
                joins=tuple(JoinRecord(**with_path_tuple(j)) for j in data["joins"]),
                seed=data["seed"],
                seeds_honoured=bool(data["seeds_honoured"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(1, 1, str(error), [f"the fields of {SCHEMA}"]) from None
        return trajectory
