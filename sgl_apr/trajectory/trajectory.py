"""The trajectory: an immutable graph of spans, with blocks and branches as a view of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any

from sgl_apr.errors import TraceError
from sgl_apr.trajectory.blocks import Block, iter_blocks
from sgl_apr.trajectory.calls import Call, JoinRecord, LimitHit, PacingDecision
from sgl_apr.trajectory.join_layout import Layout, LayoutError, parse_prefix_layout
from sgl_apr.trajectory.metrics import Convention, Metrics, compute_metrics, context_lengths
from sgl_apr.trajectory.references import check_references
from sgl_apr.trajectory.spans import Finish, Span, ancestors
from sgl_apr.trajectory.strict_json import WrongValue, describe, read_strictly
from sgl_apr.trajectory.tool_calls import ToolCall
from sgl_apr.trajectory.worker_groups import GroupRecord, tokens_seen

SCHEMA = "sgl_apr.trajectory/8"
IGNORED_FIELDS = (
    "schema",
    "source",
    "valid",
    "defects",
    "metrics",
)  # all but the first by `sgl-apr parse --json`


@dataclass(frozen=True)
class Trajectory:
    """Everything that happened in one reply.

    Attributes:
        spans: The spans, in the order of the text.
        dialect: The name of the dialect.
        calls: The engine calls.
        wall_s: Seconds from start to end.
        limits: Where the budget or another limit acted, in the order of time.
        decisions: How forks were paced, in the order of time.
        joins: How blocks were joined where a KV join was requested, in the order of time.
        seed: The seed from which the seeds of the calls are derived.
        seeds_honoured: Whether the engine supports seeds.
        tokens_shared: Whether the branches of a fork shared their tokens. Otherwise each had a fixed equal part, since
            the engine cannot continue a request in the middle of its grammar.
        tool_calls: The calls of tools, in the order in which they ended.
        prompt_layout: How the beginning of the prompt was joined in the KV cache in earlier turns, as JSON of a layout
            (`sgl_apr.trajectory.join_layout`). Empty if it is one sequence.
        groups: The blocks whose branches decoded as a group of workers, each token seeing the tokens of all.

    Examples:
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
    tokens_shared: bool = False
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_layout: str = ""
    groups: tuple[GroupRecord, ...] = ()

    @property
    def prompt(self) -> str:
        """The text of the prompt spans."""
        return "".join(s.text for s in self.spans if s.origin == "prompt")

    @property
    def text(self) -> str:
        """The complete reply, tags and injected text included, without the prompt.

        Of a branch that saw only a message it holds only the result, as the context of the trunk does. Calls of tools and
        their results are part of it. A result may spell tags, so that the text cannot be parsed again.
        """
        return "".join(s.text for s in self.reply_spans)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids of `text`, as the engine received and returned them."""
        return tuple(i for s in self.reply_spans if s.tokens for i in s.token_ids or ())

    @property
    def reply_spans(self) -> tuple[Span, ...]:
        """The spans of `text`: the reply without branches that had their own context."""
        separate: list[bool] = []  # whether a span belongs to a branch with its own context
        for span in self.spans:
            separate.append(all(separate[p] for p in span.parents) if span.parents else bool(span.waits_for))
        return tuple(
            span
            for span, is_separate in zip(self.spans, separate, strict=True)
            if not is_separate and span.origin != "prompt"
        )

    @property
    def context_ids(self) -> tuple[int, ...]:
        """The token ids that further text is conditioned on: the prompt and `text`, without what was dropped.

        Forks that a join removed are dropped from the context, and so are calls of tools without a result.
        """
        if not self.spans:
            return ()
        in_reply = set(map(id, self.reply_spans))
        last = max((i for i, s in enumerate(self.spans) if id(s) in in_reply), default=len(self.spans) - 1)
        while self.spans[last].role == "call" and self.spans[last].parents:
            (last,) = self.spans[last].parents
        return tuple(t for i in self.ancestors(last) for t in self.spans[i].token_ids or ())

    def ancestors(self, index: int) -> list[int]:
        """Return the indices of what a span was conditioned on, and its own, in the order of the text."""
        return ancestors(self.spans, index)

    @property
    def reply(self) -> tuple[Span, ...]:
        """All spans except the prompt."""
        return tuple(s for s in self.spans if s.origin != "prompt")

    def with_prompt(self, prompt: str, token_ids: tuple[int, ...] | None = None) -> Trajectory:
        """Return the same reply with a prompt, for a trajectory that has none."""

        def shift(indices: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(i + 1 for i in indices)

        first = Span("prompt", "prompt", prompt, token_ids, ())
        spans = (
            replace(
                s, parents=shift(s.parents) or (() if s.waits_for else (0,)), waits_for=shift(s.waits_for)
            )
            for s in self.spans
        )
        return replace(self, spans=(first, *spans))

    @property
    def finish(self) -> Finish | None:
        """How the trunk ended; "malformed" if its text is not valid (possible without a grammar)."""
        return next((s.finish for s in reversed(self.spans) if s.path == () and s.finish), None)

    @property
    def answer(self) -> str:
        """The trunk's text after the last join, call and result of a tool, without leading white space.

        `text` ends with it.
        """
        return "".join(self.spans[i].text for i in self.answer_spans).lstrip()

    @property
    def answer_spans(self) -> tuple[int, ...]:
        """The indices of the spans whose text is the answer."""
        answer: list[int] = []
        for i in reversed(range(len(self.spans))):
            span = self.spans[i]
            if span.path != () or span.role != "text":
                break
            answer.append(i)
        return tuple(reversed(answer))

    @property
    def lost_joins(self) -> tuple[JoinRecord, ...]:
        """The KV joins that the cache lost in the middle of a sequence, which continued with a text join."""
        return tuple(j for j in self.joins if len(j.path) % 2 == 0)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, outer blocks before inner ones, in the order of the text."""
        return tuple(iter_blocks(self.spans))

    def metrics(self, convention: Convention = "causal") -> Metrics:
        """Return tokens, critical path, parallelism and costs: see `sgl_apr.trajectory.compute_metrics`."""
        return compute_metrics(self.spans, self.calls, self.wall_s, convention, self.tool_calls, self.groups)

    @property
    def joined_prefix(self) -> Layout:
        """The layout of `prompt_layout`.

        Raises:
            LayoutError: It is malformed, or has more tokens than the prompt.
        """
        first = self.spans[0].token_ids if self.spans and self.spans[0].origin == "prompt" else None
        return parse_prefix_layout(self.prompt_layout, len(first or ()))

    @property
    def tokens_seen(self) -> tuple[tuple[int, ...], ...]:
        """For every token of every span, how many tokens it was conditioned on, prompt included."""
        lengths = context_lengths(self.spans)
        return tuple(map(tuple, tokens_seen(self.spans, self.calls, self.groups, lengths)))

    def to_json(self) -> str:
        """Return one JSON object with its schema version. `from_json` reads it without loss.

        It can be encoded as UTF-8, also if a text holds half a surrogate pair.
        """
        fields_by_name = {"schema": SCHEMA, **shallow_dict(self)}
        text = json.dumps(fields_by_name, ensure_ascii=False, default=shallow_dict)
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(fields_by_name, default=shallow_dict)
        return text

    @classmethod
    def from_json(cls, text: str) -> Trajectory:
        """Return the trajectory that `to_json` has written; raises `TraceError` for anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise TraceError(error.lineno, error.colno, text[error.pos : error.pos + 20], ["JSON"]) from None
        except (ValueError, RecursionError, TypeError) as error:  # a huge number, deep nesting, no text
            raise TraceError(1, 1, str(error), ["JSON"], place="the JSON") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: object, where: str = "") -> Trajectory:
        """Return the trajectory of a parsed JSON object of `to_json`.

        Nothing is converted: every field has to be there with a value of its type, and every number that refers to a
        span, a call or a block has to name one. The fields that `sgl-apr parse --json` adds are ignored.

        Args:
            data: The parsed JSON.
            where: Where it stands, for error messages.

        Raises:
            TraceError: The data is anything else. `place` says where.
        """
        if not isinstance(data, Mapping):
            raise TraceError(1, 1, describe(data), ["an object"], place=where or "the JSON")
        if (schema := data.get("schema")) != SCHEMA:
            found = describe(schema) if "schema" in data else "none"
            expected = f"{SCHEMA!r}, which this version writes"
            raise TraceError(1, 1, found, [expected], place=": ".join(filter(None, (where, "schema"))))
        trajectory_fields = {name: data[name] for name in data if name not in IGNORED_FIELDS}
        trajectory = read_strictly(cls, trajectory_fields, where)
        try:
            check_references(
                trajectory.spans, trajectory.calls, trajectory.joins, trajectory.tool_calls, trajectory.groups
            )
        except WrongValue as error:
            raise error.as_trace_error(where) from None
        try:
            _ = trajectory.joined_prefix
        except LayoutError as error:
            place = ": ".join(filter(None, (where, "prompt_layout")))
            raise TraceError(1, 1, str(error), ["a layout of the prompt, as JSON"], place=place) from None
        return trajectory


def shallow_dict(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name. Unlike `dataclasses.asdict` it copies nothing.

    Raises:
        TypeError: The value is no dataclass.
    """
    kind: Any = type(value)
    return {name: getattr(value, name) for name in _field_names(kind)}


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))
