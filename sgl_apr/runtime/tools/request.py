"""A call of a tool that somebody else runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sgl_apr.trajectory.spans import Path


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """A call of a tool that has no function, as `ReasonOptions.run_tool` receives it.

    Attributes:
        id: Names the call within its trajectory.
        path: The sequence that called the tool: `()` is the trunk, `(1, 2)` is branch 2 of the first block.
        name: The name of the tool.
        arguments: The arguments, the text of a JSON object.
    """

    id: str
    path: Path
    name: str
    arguments: str


RunTool = Callable[[ToolRequest], Awaitable[str]]
