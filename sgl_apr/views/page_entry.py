"""Converts a trajectory to the JSON of the HTML page: a row for the list, and its full content without token ids."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.metrics import longest_paths
from sgl_apr.trajectory.spans import Path, Span
from sgl_apr.trajectory.tool_calls import ToolCall
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.answer_text import final_text

MAX_LIST_LANES = 12  # lanes in the small picture of a trajectory
SPAN_FIELDS = [f.name for f in fields(Span) if f.name != "token_ids"]
CALL_FIELDS = [f.name for f in fields(Call) if f.name not in ("logprobs", "seed")]


@dataclass(frozen=True, slots=True)
class PageEntry:
    """A trajectory on the page.

    Attributes:
        name: Its name in the list, such as the prompt.
        trajectory: The trajectory.
        method: The method that made it. Empty: the dialect's name is shown.
        label: A further label.
        answer: The answer. None: the trajectory's own.
        correct: Whether the answer is correct. None if it was not judged.
        size: The size of the problem. None if it has none.
        limit: The limit that was swept, and its value: a field of `Budget`. None outside a sweep.
    """

    name: str
    trajectory: Trajectory
    method: str = ""
    label: str = ""
    answer: str | None = None
    correct: bool | None = None
    size: int | None = None
    limit: tuple[str, float] | None = None


def list_row(entry: PageEntry) -> dict[str, Any]:
    """Return the row of a trajectory: the figures that the list is filtered and sorted by, and that plots show.

    Raises:
        AprError: The token counts of the trajectory are unknown.
    """
    m = entry.trajectory.metrics()
    return {
        "name": entry.name,
        "method": entry.method or entry.trajectory.dialect,
        "label": entry.label,
        "answer": final_text(entry.trajectory) if entry.answer is None else entry.answer,
        "correct": entry.correct,
        "size": entry.size,
        "limit": entry.limit and entry.limit[0],
        "limit_value": entry.limit and entry.limit[1],
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
        "tools": m.tool_calls,
        "tool_s": round(m.tool_s, 3),
        "critical_tool_s": round(m.critical_tool_s, 3),
        "shape": lane_extents(entry.trajectory),
    }


def full_entry(trajectory: Trajectory) -> dict[str, Any]:
    """Return everything that the page shows of a trajectory, with token counts in place of token ids."""
    return {
        "dialect": trajectory.dialect,
        "wall": trajectory.wall_s,
        "spans": [_span(span) for span in trajectory.spans],
        "calls": [_call(call) for call in trajectory.calls],
        "tools": [_tool_call(call) for call in trajectory.tool_calls],
        "limits": [asdict(limit) for limit in trajectory.limits],
        "decisions": [asdict(decision) for decision in trajectory.decisions],
        "joins": [asdict(join) for join in trajectory.joins],
        "groups": [asdict(group) for group in trajectory.groups],
    }


def lane_extents(trajectory: Trajectory) -> list[int]:
    """Return where the trunk and the first branches begin and end, in percent of the longest chain.

    Examples:
        >>> import sgl_apr as apr
        >>> ids = apr.ByteTokenizer()
        >>> lane_extents(apr.dialect("threadweaver").parse("six times seven is 42", ids))
        [0, 100]
    """
    spans = trajectory.spans
    weights = [0 if s.origin == "prompt" else s.tokens for s in spans]
    ends = longest_paths(spans, weights)
    longest = max(1, *ends) if ends else 1
    extents: dict[Path, tuple[int, int]] = {}
    for span, weight, end in zip(spans, weights, ends, strict=True):
        low, high = extents.get(lane := _lane(span), (end - weight, end))
        extents[lane] = min(low, end - weight), max(high, end)
    return [round(100 * x / longest) for lane in sorted(extents)[:MAX_LIST_LANES] for x in extents[lane]]


def _lane(span: Span) -> Path:
    """Return the sequence whose text contains the span: the result of a branch is in its parent's text."""
    return span.path[:-2] if span.role == "result" else span.path


def _span(span: Span) -> dict[str, Any]:
    return {**{name: getattr(span, name) for name in SPAN_FIELDS}, "tokens": span.tokens}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {**asdict(call), "started": round(call.started, 4), "ended": round(call.ended, 4)}


def _call(call: Call) -> dict[str, Any]:
    fields = {name: getattr(call, name) for name in CALL_FIELDS}
    return {**fields, "started": round(call.started, 4), "ended": round(call.ended, 4)}
