"""Exports a finished trajectory as OpenTelemetry spans, if the API is installed. It configures no SDK."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.spans import Path
from sgl_apr.trajectory.tool_calls import ToolCall

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger(__name__)
Attribute = str | int | float | bool


def export(
    dialect: str,
    calls: Sequence[Call],
    seconds: float,
    *,
    tool_calls: Sequence[ToolCall] = (),
    attributes: Mapping[str, Attribute] = {},
    error: BaseException | None = None,
) -> None:
    """Export a trajectory that has just ended.

    Its span is a child of the current span. It has a span for each branch, nested as the branches are, and these have
    one for each request and each call of a tool. The function never raises, and costs almost nothing without a configured SDK.

    Args:
        dialect: The format.
        calls: The requests.
        seconds: How long the trajectory took.
        tool_calls: The calls of tools.
        attributes: Further attributes of its span.
        error: Why it failed, if it did.
    """
    ended = time.time_ns()
    began = ended - round(seconds * 1e9)
    try:
        if (tracer := _tracer()) is None:
            return
        root = tracer.start_span("apr.trajectory", start_time=began)
        if not root.is_recording():
            return
        root.set_attributes({"apr.dialect": dialect, **attributes})
        _export_calls(tracer, root, began, calls, tool_calls)
        if error is not None:
            _fail(root, error, ended)
        root.end(ended)
    except Exception:  # of an exporter or a span processor: the reply matters more
        log.warning("a trajectory could not be exported", exc_info=True)


@cache
def _tracer() -> Tracer | None:
    """The tracer, which follows a provider that is set later. None without OpenTelemetry."""
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace.get_tracer("sgl_apr")


def _export_calls(
    tracer: Tracer, root: Span, began: int, calls: Sequence[Call], tool_calls: Sequence[ToolCall]
) -> None:
    from opentelemetry.trace import set_span_in_context

    def at(seconds: float) -> int:
        return began + round(seconds * 1e9)

    def start(name: str, parent: Span, started: float, attributes: Mapping[str, Attribute]) -> Span:
        return tracer.start_span(
            name, set_span_in_context(parent), start_time=at(started), attributes=attributes
        )

    spans: dict[Path, Span] = {(): root}
    periods = _branches([*calls, *tool_calls])
    for path, (started, _) in periods.items():
        number = _dotted(path)
        spans[path] = start(f"apr.branch {number}", spans[path[:-2]], started, {"apr.path": number})
    for call in calls:
        start(f"apr.{call.phase}", spans[call.path], call.started, _attributes(call)).end(at(call.ended))
    for tool_call in tool_calls:
        span = start(
            f"execute_tool {tool_call.name}".rstrip(),
            spans[tool_call.path],
            tool_call.started,
            _tool_attributes(tool_call),
        )
        if tool_call.outcome != "ok":
            _mark_failed(span, tool_call.outcome)
        span.end(at(tool_call.ended))
    for path, (_, ended) in reversed(periods.items()):
        spans[path].end(at(ended))


def _branches(calls: Sequence[Call | ToolCall]) -> dict[Path, tuple[float, float]]:
    """When each branch began and ended, inner branches included. Outer branches come first."""
    periods: dict[Path, tuple[float, float]] = {}
    for call in calls:
        for depth in range(2, len(call.path) + 1, 2):
            path = call.path[:depth]
            started, ended = periods.get(path, (call.started, call.ended))
            periods[path] = min(started, call.started), max(ended, call.ended)
    return periods


def _attributes(call: Call) -> dict[str, Attribute]:
    """Attributes of a call. Names under `gen_ai` are those of OpenTelemetry's semantic conventions."""
    values: dict[str, Attribute | None] = {
        "apr.path": _dotted(call.path),
        "gen_ai.usage.input_tokens": call.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": call.cached_tokens,
        "gen_ai.usage.output_tokens": call.output_tokens,
        "apr.new_tokens": call.new_tokens,
        "apr.retries": call.retries,
    }
    return {name: value for name, value in values.items() if value is not None}


def _tool_attributes(call: ToolCall) -> dict[str, Attribute]:
    """Attributes of a call of a tool. Arguments and results may be private, so they are not exported."""
    attributes: dict[str, Attribute] = {
        "apr.path": _dotted(call.path),
        "apr.tool.outcome": call.outcome,
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": call.name,
        "gen_ai.tool.call.id": call.id,
    }
    return attributes if call.outcome == "ok" else attributes | {"error.type": call.outcome}


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _fail(span: Span, error: BaseException, ended: int) -> None:
    span.record_exception(error, timestamp=ended)
    _mark_failed(span, f"{type(error).__name__}: {error}")


def _mark_failed(span: Span, why: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, why))
