"""Events of a trajectory while it is written, and the trajectory rebuilt from them.

Events come in this order:

1. `SpanFinished` of the prompt, then what the trunk does.
2. `Delta`s of a sequence, before the `SpanFinished` of the spans that they belong to.
3. `Forked`, before all events of its branches. Events of parallel branches are interleaved.
4. `BranchEnded`, after the last event of its branch. In a join by message the result follows, with the branch's path.
5. `Joined`, after the `BranchEnded` of every branch that it joins and after all that is written at the join.
6. `ToolCalled`, after the `SpanFinished` of its call. `ToolReturned` follows, before the `Delta` and the `SpanFinished` of the
   result. A call that is not run, such as one that a limit cut, has a `ToolReturned` alone.
7. `Done`, last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sgl_apr.errors import AprError
from sgl_apr.trajectory.blocks import Outcome
from sgl_apr.trajectory.calls import Call, JoinRecord, LimitHit, PacingDecision
from sgl_apr.trajectory.references import check_references
from sgl_apr.trajectory.spans import Path, Span
from sgl_apr.trajectory.strict_json import WrongValue
from sgl_apr.trajectory.tool_calls import ToolCall
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.trajectory.worker_groups import GroupRecord


@dataclass(frozen=True, slots=True)
class Delta:
    """Text as it is written, decoded or injected: by the trunk (path `()`), or by a branch."""

    path: Path
    text: str


@dataclass(frozen=True, slots=True)
class TextRetracted:
    """Text of a request that failed is void, and is sent again.

    Attributes:
        path: The sequence.
        chars: How many of its last characters are void. None if a branch restarts: all of its text and of what it
            forked is void. The text of its header is sent again, the header's span is not.
    """

    path: Path
    chars: int | None


@dataclass(frozen=True, slots=True)
class SpanFinished:
    """A finished span, with the index that other spans use in `parents` and `waits_for`."""

    index: int
    span: Span


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """An engine request has ended."""

    index: int
    call: Call


@dataclass(frozen=True, slots=True)
class Forked:
    """A fork.

    Attributes:
        path: The block.
        branches: Number and outline of each branch, as written.
        first_branch: The first of these branches, counted from 1. A trunk that continues while its branches run emits
            one event for each branch.
    """

    path: Path
    branches: tuple[tuple[str, str], ...]
    first_branch: int = 1


@dataclass(frozen=True, slots=True)
class BranchEnded:
    """A branch has ended."""

    path: Path
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Joined:
    """Branches of block `path`, by their last path entry, are in the text of the sequence that forked them."""

    path: Path
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ToolCalled:
    """A model has called a tool, which starts to run.

    Attributes:
        path: The sequence.
        id: Names the call within its trajectory.
        name: The name of the tool.
        arguments: The arguments, the text of a JSON object.
    """

    path: Path
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolReturned:
    """A call of a tool has ended. Calls are counted in the order in which they end."""

    index: int
    call: ToolCall


@dataclass(frozen=True, slots=True)
class Done:
    """The end: the order of the spans in the text, and what holds for the whole trajectory."""

    order: tuple[int, ...]
    dialect: str
    wall_s: float
    limits: tuple[LimitHit, ...]
    decisions: tuple[PacingDecision, ...]
    joins: tuple[JoinRecord, ...]
    seed: int | None
    seeds_honoured: bool
    tokens_shared: bool = False
    prompt_layout: str = ""
    groups: tuple[GroupRecord, ...] = ()


Event = (
    Delta
    | TextRetracted
    | SpanFinished
    | RequestFinished
    | Forked
    | BranchEnded
    | Joined
    | ToolCalled
    | ToolReturned
    | Done
)
OnEvent = Callable[[Event], None]


def rebuild(events: Iterable[Event]) -> Trajectory:
    """The trajectory that these events belong to.

    Raises:
        AprError: `Done` is missing, or a span or call that it or another event refers to.
    """
    spans: dict[int, Span] = {}
    calls: dict[int, Call] = {}
    tool_calls: dict[int, ToolCall] = {}
    for event in events:
        if isinstance(event, SpanFinished):
            spans[event.index] = event.span
        elif isinstance(event, RequestFinished):
            calls[event.index] = event.call
        elif isinstance(event, ToolReturned):
            tool_calls[event.index] = event.call
        elif isinstance(event, Done):
            try:
                trajectory = assemble_trajectory(
                    spans,
                    [calls[i] for i in range(len(calls))],
                    event,
                    [tool_calls[i] for i in range(len(tool_calls))],
                )
                check_references(
                    trajectory.spans,
                    trajectory.calls,
                    trajectory.joins,
                    trajectory.tool_calls,
                    trajectory.groups,
                )
            except KeyError as error:
                raise AprError(f"the events lack a span or call: there is none of index {error}") from None
            except WrongValue as error:
                raise error.as_trace_error("the events") from None
            return trajectory
    raise AprError("the events end before the trajectory does: Done is missing")


def assemble_trajectory(
    spans: Mapping[int, Span] | Sequence[Span],
    calls: Sequence[Call],
    done: Done,
    tool_calls: Sequence[ToolCall] = (),
) -> Trajectory:
    """Spans, requests and calls of tools, each in the order in which they came, as a trajectory."""
    place = {old: new for new, old in enumerate(done.order)}

    def moved(span: Span) -> Span:
        parents = tuple([place[i] for i in span.parents])
        waits_for = tuple([place[i] for i in span.waits_for]) if span.waits_for else ()
        if parents == span.parents and waits_for == span.waits_for:
            return span
        return span.with_references(parents, waits_for)

    return Trajectory(
        tuple(moved(spans[i]) for i in done.order),
        done.dialect,
        tuple(calls),
        done.wall_s,
        done.limits,
        done.decisions,
        done.joins,
        done.seed,
        done.seeds_honoured,
        done.tokens_shared,
        tuple(tool_calls),
        done.prompt_layout,
        done.groups,
    )
