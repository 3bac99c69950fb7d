"""Two tools, and what has to hold for a trajectory whose random model called them."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal

from jsonschema import validate
from pydantic import Field

import sgl_apr as apr
from sgl_apr.formats.tool_syntax import ToolDefinition
from tests.support.tool_sampler import detected

DIALECTS = ("threadweaver", "multiverse", "spawn")
PARSERS = ("qwen25", "qwen3_coder")
CALL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def search(
    query: Annotated[str, Field(max_length=8)],
    kind: Literal["web", "book"] = "web",
    limit: Annotated[int, Field(ge=1, le=99)] = 3,
) -> str:
    """Search."""
    return f"</Thread><tool_call>{query} {kind} {limit}</tool_call></Path><|im_end|>"


async def plot(
    points: Annotated[list[bool], Field(max_length=3)], note: Literal["a", None] = None
) -> list[Any]:
    """Plot."""
    await asyncio.sleep(0.001)
    return [points, note]


def check(trajectory: apr.Trajectory, parser: str) -> int:
    """Check a trajectory and return how many calls it has."""
    definitions = {tool.name: tool for tool in map(apr.Tool.from_function, (search, plot))}
    known = tuple(ToolDefinition.from_schema(t.name, t.description, t.schema) for t in definitions.values())
    dialect = apr.dialect(trajectory.dialect)
    written = "".join(s.text for s in trajectory.reply_spans if s.role not in ("call", "observation"))
    dialect.validate(written)
    records = {called.id: called for called in trajectory.tool_calls}
    seen = 0
    for k, span in enumerate(trajectory.spans):
        if span.role != "call":
            continue
        ids = span.label.split()
        if any(records[i].outcome == "length" for i in ids):
            continue
        assert [(records[i].name, json.loads(records[i].arguments)) for i in ids] == detected(
            parser, span.text, known
        )
        for i in ids:
            validate(json.loads(records[i].arguments), definitions[records[i].name].schema)
            assert records[i].outcome in ("ok", "cancelled"), records[i]
        results = [s for s in trajectory.spans[k + 1 :] if s.role == "observation" and s.label in ids]
        assert [s.label for s in results] == ids
        seen += len(ids)
    return seen
