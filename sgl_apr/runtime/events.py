"""What one hears of a trajectory while it is written, and the trajectory rebuilt from it; nothing runs here.

The order: `Wrote` of the prompt, then what the trunk does. A sequence's `Delta`s come before the `Wrote` of the
spans that they belong to; `Forked` before anything of its branches; `Ended` behind the last that its branch
writes; then, in a join by message, what the branch returned, which has its path; `Joined` behind the `Ended` of
every branch it joins and all that is written at the join. `Done` is the last. What branches of one fork do is
interleaved as it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sgl_apr.errors import AprError
from sgl_apr.trajectory.blocks import Outcome
from sgl_apr.trajectory.calls import Call, JoinRecord, LimitHit, PacingDecision
from sgl_apr.trajectory.spans import Path, Span
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Delta:
    """Text as it is written, decoded or injected: by the trunk (path `()`), or by a branch."""

    path: Path
    text: str


@dataclass(frozen=True, slots=True)
class TextRetracted:
    """What was heard of a request that failed is void, and comes again: the last `chars` characters at `path`,
    or, where a branch begins anew (None), all of it and of what it forked; the text of its header comes
    again, its span does not."""

    path: Path
    chars: int | None


@dataclass(frozen=True, slots=True)
class SpanFinished:
    """A finished span, with the number that other spans call it by in `parents` and `after`."""

    index: int
    span: Span


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """An engine request has ended."""

    index: int
    call: Call


@dataclass(frozen=True, slots=True)
class Forked:
    """Block `path` has these branches: number and outline, as written. Where a trunk goes on beside its
    branches there is one event for each, with `first` counting on."""

    path: Path
    branches: tuple[tuple[str, str], ...]
    first_number: int = 1


@dataclass(frozen=True, slots=True)
class BranchEnded:
    """A branch has ended."""

    path: Path
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Joined:
    """Branches of block `path` (by their last path entry) are in the text of the sequence that forked them."""

    path: Path
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The end: in which order the spans stand in the text, and what holds for the whole of it."""

    order: tuple[int, ...]
    dialect: str
    wall_s: float
    limits: tuple[LimitHit, ...]
    decisions: tuple[PacingDecision, ...]
    joins: tuple[JoinRecord, ...]
    seed: int | None
    seeds_honoured: bool


Event = Delta | TextRetracted | SpanFinished | RequestFinished | Forked | BranchEnded | Joined | Done
OnEvent = Callable[[Event], None]


def rebuild(events: Iterable[Event]) -> Trajectory:
    """The trajectory that these events are of, all of them; raises `AprError` if they end before it does."""
    spans: dict[int, Span] = {}
    calls: dict[int, Call] = {}
    for event in events:
        if isinstance(event, SpanFinished):
            spans[event.index] = event.span
        elif isinstance(event, RequestFinished):
            calls[event.index] = event.call
        elif isinstance(event, Done):
            return assemble_trajectory(spans, [calls[i] for i in range(len(calls))], event)
    raise AprError("the events end before the trajectory does: Done is missing")


def assemble_trajectory(
    spans: Mapping[int, Span] | Sequence[Span], calls: Sequence[Call], done: Done
) -> Trajectory:
    """Spans and calls, each in the order in which they came, as a trajectory."""
    place = {old: new for new, old in enumerate(done.order)}

    def moved(span: Span) -> Span:
        if all(place[i] == i for i in (*span.parents, *span.waits_for)):
            return span
        parents, after = (tuple(place[i] for i in indices) for indices in (span.parents, span.waits_for))
        return replace(span, parents=parents, waits_for=after)

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
    )
