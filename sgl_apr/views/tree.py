"""Renders a trajectory as a tree for the terminal, and its metrics as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from rich.tree import Tree

from sgl_apr.trajectory.blocks import Block, Branch
from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.tool_calls import ToolCall, called_tools
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.answer_text import ends_with_branches
from sgl_apr.views.fitted_table import Column, FittedTable
from sgl_apr.views.printable import printable
from sgl_apr.views.tool_text import tool_lines

TOOL_STYLE = "cyan"
PANEL_WIDTH = 38  # columns of a branch
FINISH_LABELS = {
    "length": "stopped at its token limit",
    "eos": "ended early",
    "aborted": "stopped when enough branches had ended",
    "timeout": "stopped at its deadline",
    "failed": "failed",
    "malformed": "malformed",
}


def render_tree(trajectory: Trajectory, title: str, max_blocks: int | None = None) -> Tree:
    """Render the trunk, the branches in columns, the conclusions and the answer, unless nothing follows the branches.

    The text of a model is shown as it is, never as markup. In place of a call of a tool and its result stand two lines, with
    the beginning of the arguments and of the result.

    Args:
        trajectory: The trajectory.
        title: The root of the tree.
        max_blocks: How many blocks of the trunk are shown at most, the first ones. By default all.
    """
    root = Tree(Text(printable(title), style="bold"))
    blocks = {block.path: block for block in trajectory.blocks}
    tools = {call.id: call for call in trajectory.tool_calls}
    answering = set(trajectory.answer_spans)
    outer = sum(len(path) == 1 for path in blocks)
    shown = 0
    for i, span in enumerate(trajectory.spans):
        if block := blocks.pop(span.path[:1], None):
            if shown == max_blocks:
                root.add(Text(f"({outer - shown} more blocks)", style="yellow"))
                break
            _add_block(root, block, trajectory, tools)
            shown += 1
        if span.path == () and span.role == "text" and i not in answering and span.text.strip():
            root.add(Text(printable(span.text.strip())))
        if span.path == () and span.role == "call":
            root.add(Text(tool_lines(called_tools(span, tools)) or printable(span.text.strip()), TOOL_STYLE))
    answer = printable(trajectory.answer.strip())
    if answer or not ends_with_branches(trajectory):
        root.add(Text.assemble(("answer  ", "bold green"), answer or "(none)"))
    return root


def _add_block(root: Tree, block: Block, trajectory: Trajectory, tools: Mapping[str, ToolCall]) -> None:
    panels = []
    for branch in block.branches:
        label = FINISH_LABELS.get(branch.finish or "", "")
        panels.append(
            Panel(
                _branch_text(branch, trajectory, tools),
                title=_panel_title(
                    f"{branch.number}: {branch.outline}" if branch.outline else str(branch.number)
                ),
                subtitle=_panel_title(label, "yellow") if label else None,
                width=PANEL_WIDTH,
            )
        )
    group = next((group for group in trajectory.groups if group.path == block.path), None)
    title = f"group of {len(panels)} workers ({group.kind})" if group else f"fork into {len(panels)}"
    node = root.add(Text(title, style="bold magenta"))
    node.add(Columns(panels))
    if block.conclusion:
        node.add(Text.assemble(("conclusion  ", "bold magenta"), printable(block.conclusion)))


def _branch_text(branch: Branch, trajectory: Trajectory, tools: Mapping[str, ToolCall]) -> Text:
    """The text of a branch, with two lines in place of each call of a tool and its result."""
    spans = [trajectory.spans[i] for i in branch.spans]
    if not any(called_tools(span, tools) for span in spans):
        return Text(printable(branch.text.strip()))
    lines: list[Text] = []
    text = ""
    for span in spans:
        if span.path == branch.path and span.role in ("header", "closer", "result"):
            continue
        calls = called_tools(span, tools)
        if not calls:
            text += span.text
        elif span.role == "call":
            lines += [Text(printable(text.strip())), Text(tool_lines(calls), TOOL_STYLE)]
            text = ""
    return Text("\n").join(line for line in [*lines, Text(printable(text.strip()))] if line)


def _panel_title(title: str, style: str = "cyan") -> Text:
    text = Text(" ".join(printable(title).split()), style=style)
    text.truncate(PANEL_WIDTH - 6, overflow="ellipsis")  # rich itself cuts a title without a sign
    return text


def render_summary(trajectories: dict[str, Trajectory]) -> FittedTable:
    """Render a table with one row per trajectory.

    Args:
        trajectories: The trajectories by title. Tokens and seconds are those that the engine reported. Columns of tools are
            shown if any trajectory calls one.
    """
    metrics = [trajectory.metrics() for trajectory in trajectories.values()]
    calls = [trajectory.calls for trajectory in trajectories.values()]
    tools: list[Column] = []
    if any(m.tool_calls for m in metrics):
        tools = [
            Column("tool calls", [str(m.tool_calls) for m in metrics], rank=7),
            Column("tool seconds", [f"{m.tool_s:.1f}" for m in metrics], rank=9),
            Column("tools in sequence", [f"{m.critical_tool_s:.1f}" for m in metrics], rank=8),
        ]
    return FittedTable(
        [
            Column("question", list(trajectories), shrinks=True),
            Column("forks", [str(m.blocks) for m in metrics], rank=6),
            Column("branches", [str(m.branches) for m in metrics], rank=3),
            Column("total tokens", [str(m.total) for m in metrics], rank=1),
            Column("critical path", [str(m.critical_path) for m in metrics]),
            Column("acceleration", [f"{m.acceleration:.0%}" for m in metrics], rank=4),
            Column("prefix cached", [_cached(c) for c in calls], rank=5),
            Column("seconds", [f"{m.wall_s:.1f}" for m in metrics], rank=2),
            *tools,
        ],
        title="Metrics",
    )


def _cached(calls: Sequence[Call]) -> str:
    """Return how much of the prefixes that branches share with their trunk was in the cache."""
    branches = [call for call in calls if call.phase == "branch" and call.cached_tokens is not None]
    shared = sum(call.shared_tokens for call in branches)
    if not shared:
        return "-"  # the branches have contexts of their own, or nothing was recorded
    return f"{sum(min(call.cached_tokens or 0, call.shared_tokens) for call in branches) / shared:.0%}"


def render_report(trajectory: Trajectory, title: str, max_blocks: int | None = None) -> RenderableType:
    """Render the tree of a trajectory, as `render_tree` does, and its metrics."""
    return Group(render_tree(trajectory, title, max_blocks), render_summary({title: trajectory}))
