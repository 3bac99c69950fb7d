"""Describes calls of tools in one line each, safe for a terminal whatever a model or a tool wrote."""

from __future__ import annotations

from collections.abc import Sequence

from sgl_apr.trajectory.tool_calls import ToolCall, ToolOutcome
from sgl_apr.views.printable import printable

TOOL_OUTCOME_LABELS: dict[ToolOutcome, str] = {
    "ok": "returned",
    "error": "failed",
    "timeout": "timed out",
    "cancelled": "cancelled",
    "refused": "refused",
    "length": "cut off",
}
MAX_ARGUMENT_CHARS = 120
MAX_RESULT_CHARS = 200


def single_line(text: str, max_chars: int) -> str:
    """Return untrusted text in one line of at most so many characters.

    Examples:
        >>> single_line("a\\x1b[31m\\n  b" + "c" * 90, 12)
        'a[31m bcccc…'
    """
    line = " ".join(printable(text[: 8 * max_chars]).split())
    cut = len(line) > max_chars or len(text) > 8 * max_chars
    return line[: max_chars - 1] + "…" if cut else line


def describe_tool(name: str, arguments: str) -> str:
    """Return the name of a tool and its arguments in one line.

    Examples:
        >>> describe_tool("search", '{"query": "tides"}')
        'search {"query": "tides"}'
    """
    return f"{single_line(name, 64) or '(no name)'} {single_line(arguments, MAX_ARGUMENT_CHARS)}".rstrip()


def describe_result(call: ToolCall) -> str:
    """Return how a call ended, how long it took, and what it returned, in one line."""
    ended = f"{TOOL_OUTCOME_LABELS[call.outcome]} in {call.seconds:.1f} s"
    if call.outcome == "length":
        return "cut off by a token limit"
    result = single_line(call.result, MAX_RESULT_CHARS)
    return f"{ended}: {result}" if result else ended


def tool_lines(calls: Sequence[ToolCall]) -> str:
    """Return two lines for each call: what was called, and what it returned."""
    return "\n".join(
        f"→ {describe_tool(call.name, call.arguments)}\n← {describe_result(call)}" for call in calls
    )
