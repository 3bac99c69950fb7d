"""Converts the events of a trajectory to JSON objects and back.

An object has the kind of its event in "event", and the fields of the event under their names
(`sgl_apr.runtime.events`):

    {"event": "delta", "path": [1, 2], "text": "..."}
    {"event": "text_retracted", "path": [], "chars": 12}
    {"event": "span_finished", "index": 3, "span": {"role": "body", "origin": "decoded", "text": "...", ...}}
    {"event": "request_finished", "index": 1, "call": {"phase": "branch", "path": [1, 2], "prompt_tokens": 40, ...}}
    {"event": "forked", "path": [1], "branches": [["1", "an outline"], ["2", "another"]], "first_branch": 1}
    {"event": "branch_ended", "path": [1, 2], "outcome": "ok"}
    {"event": "joined", "path": [1], "branches": [1, 2]}
    {"event": "tool_called", "path": [1, 2], "id": "call_1.2_1", "name": "search", "arguments": "{...}"}
    {"event": "tool_returned", "index": 0, "call": {"id": "call_1.2_1", "path": [1, 2], "name": "search", ...}}
    {"event": "done", "order": [0, 1, ...], "dialect": "threadweaver", "wall_s": 2.5, "limits": [], ...}

`apr.rebuild(map(event_from_json, objects))` is exactly the trajectory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sgl_apr.errors import TraceError
from sgl_apr.runtime.events import (
    BranchEnded,
    Delta,
    Done,
    Event,
    Forked,
    Joined,
    RequestFinished,
    SpanFinished,
    TextRetracted,
    ToolCalled,
    ToolReturned,
)
from sgl_apr.trajectory.strict_json import describe, read_strictly


def _snake_case(kind: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


EVENT_TYPES: Mapping[str, type[Event]] = {
    _snake_case(kind): kind
    for kind in (
        Delta,
        TextRetracted,
        SpanFinished,
        RequestFinished,
        Forked,
        BranchEnded,
        Joined,
        ToolCalled,
        ToolReturned,
        Done,
    )
}


def event_to_json(event: Event) -> dict[str, Any]:
    """Return the JSON object of an event. A JSON encoder writes its tuples as lists."""
    return {"event": _snake_case(type(event)), **asdict(event)}


def event_from_json(data: Mapping[str, Any]) -> Event:
    """Return the event of a JSON object.

    Nothing is converted: every field has a value of its type, and there are no others. Fields with a default may be
    missing.

    Raises:
        TraceError: The object is not an event. `place` says where.
    """
    if not isinstance(data, Mapping):
        raise TraceError(1, 1, describe(data), ["an object"], place="the event")
    name = data.get("event")
    kind = EVENT_TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise TraceError(1, 1, describe(name), list(EVENT_TYPES), place="event")
    values = {key: value for key, value in data.items() if key != "event"}
    event: Event = read_strictly(kind, values, str(name), defaults=True)
    return event
