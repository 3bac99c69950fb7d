"""Records of the tools that a model called during a trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sgl_apr.trajectory.spans import Path, Span

ToolOutcome = Literal["ok", "error", "timeout", "cancelled", "refused", "length"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool, and what it returned.

    Attributes:
        id: Names the call within its trajectory, as in OpenAI's API.
        path: The sequence that called it.
        name: The name of the tool. Empty if a token limit cut the call before it.
        arguments: The arguments, the text of a JSON object. Of a call that a token limit cut, what was decoded.
        result: What the model read as its result, without the form of the chat template.
        outcome: "ok"; "error" if the tool failed; "timeout" if it took longer than `Budget.tool_seconds`; "cancelled" if
            its sequence was cut; "refused" if it was not run, since the budget had no calls left or the arguments do not
            fit the schema; "length" if a token limit cut the call or left no room for its
            result, so that it was dropped from the context.
        started: When it started, in seconds since the trajectory began.
        ended: When it ended, in seconds since the trajectory began.
        truncated: Whether the result was longer than what the model read.
    """

    id: str
    path: Path
    name: str
    arguments: str
    result: str
    outcome: ToolOutcome
    started: float
    ended: float
    truncated: bool = False

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.started


def called_tools(span: Span, by_id: Mapping[str, ToolCall]) -> list[ToolCall]:
    """Return the calls that a span of role "call" or "observation" is about. Of ids that are not known there are none.

    Args:
        span: The span.
        by_id: The calls of its trajectory by their ids.
    """
    if span.role not in ("call", "observation"):
        return []
    return [by_id[name] for name in span.label.split() if name in by_id]
