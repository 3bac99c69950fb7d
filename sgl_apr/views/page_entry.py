"""What the page knows of one trajectory: a row of its list, and all of it without token ids; plain JSON values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.metrics import longest_paths
from sgl_apr.trajectory.spans import Path, Span
from sgl_apr.trajectory.trajectory import Trajectory

MAX_LIST_LANES = 12  # of a trajectory in the list
SPAN_FIELDS = [f.name for f in fields(Span) if f.name != "token_ids"]
CALL_FIELDS = [f.name for f in fields(Call) if f.name not in ("logprobs", "seed")]


@dataclass(frozen=True, slots=True)
class PageEntry:
    """A trajectory and what is known of it besides: None for what nobody judged, or what has no size."""

    name: str
    trajectory: Trajectory
    method: str = ""
    label: str = ""
    answer: str | None = None
    correct: bool | None = None
    size: int | None = None


def list_row(entry: PageEntry) -> dict[str, Any]:
    """The figures that the list is filtered and sorted by, and plots are made of; raises `AprError` where tokens
    are unknown."""
    m = entry.trajectory.metrics()
    return {
        "name": entry.name,
        "method": entry.method or entry.trajectory.dialect,
        "label": entry.label,
        "answer": entry.trajectory.answer if entry.answer is None else entry.answer,
        "correct": entry.correct,
        "size": entry.size,
        "tokens": m.total,
        "critical": m.critical_path,
        "context": m.longest_context,
        "inside": m.branch_tokens,
        "blocks": m.blocks,
        "branches": m.branches,
        "wall": round(m.wall_s, 3),
        "calls": m.engine_calls,
        "prompt": m.prompt_tokens,
        "cached": m.cached_tokens,
        "again": m.reprefilled_tokens,
        "shape": lane_extents(entry.trajectory),
    }


def full_entry(trajectory: Trajectory) -> dict[str, Any]:
    """All that is drawn or read of a trajectory: spans and calls as they are, with counts in place of token ids."""
    return {
        "dialect": trajectory.dialect,
        "wall": trajectory.wall_s,
        "spans": [_span(span) for span in trajectory.spans],
        "calls": [_call(call) for call in trajectory.calls],
        "limits": [asdict(limit) for limit in trajectory.limits],
        "decisions": [asdict(decision) for decision in trajectory.decisions],
        "joins": [asdict(join) for join in trajectory.joins],
    }


def lane_extents(trajectory: Trajectory) -> list[int]:
    """Where the trunk and its first branches begin and end in the longest chain, in percent of it.

    >>> import sgl_apr as apr
    >>> ids = apr.ByteTokenizer()
    >>> shape(apr.dialect("threadweaver").parse("six times seven is 42", ids))
    [0, 100]
    """
    spans = trajectory.spans
    weights = [0 if s.origin == "prompt" else s.tokens for s in spans]
    ends = longest_paths(spans, weights)
    most = max(1, *ends) if ends else 1
    reach: dict[Path, tuple[int, int]] = {}
    for span, weight, end in zip(spans, weights, ends, strict=True):
        low, high = reach.get(lane := _lane(span), (end - weight, end))
        reach[lane] = min(low, end - weight), max(high, end)
    return [round(100 * x / most) for lane in sorted(reach)[:MAX_LIST_LANES] for x in reach[lane]]


def _lane(span: Span) -> Path:
    """The sequence in whose text it stands: what a branch returned is in that of who forked it."""
    return span.path[:-2] if span.role == "result" else span.path


def _span(span: Span) -> dict[str, Any]:
    return {**{name: getattr(span, name) for name in SPAN_FIELDS}, "tokens": span.tokens}


def _call(call: Call) -> dict[str, Any]:
    made = {name: getattr(call, name) for name in CALL_FIELDS}
    return {**made, "started": round(call.started, 4), "ended": round(call.ended, 4)}
