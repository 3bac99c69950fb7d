"""Renders a trajectory as a tree for the terminal, and its metrics as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from rich.tree import Tree

from sgl_apr.trajectory.blocks import Block
from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.fitted_table import Column, FittedTable
from sgl_apr.views.printable import printable

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
    """Render the trunk, the branches in columns, the conclusions and the answer.

    The text of a model is shown as it is, never as markup.

    Args:
        trajectory: The trajectory.
        title: The root of the tree.
        max_blocks: How many blocks of the trunk are shown at most, the first ones. By default all.
    """
    root = Tree(Text(printable(title), style="bold"))
    blocks = {block.path: block for block in trajectory.blocks}
    answering = _answer_spans(trajectory)
    outer = sum(len(path) == 1 for path in blocks)
    shown = 0
    for i, span in enumerate(trajectory.spans):
        if block := blocks.pop(span.path[:1], None):
            if shown == max_blocks:
                root.add(Text(f"({outer - shown} more blocks)", style="yellow"))
                break
            _add_block(root, block)
            shown += 1
        if span.path == () and span.role == "text" and i not in answering and span.text.strip():
            root.add(Text(printable(span.text.strip())))
    root.add(Text.assemble(("answer  ", "bold green"), printable(trajectory.answer.strip()) or "(none)"))
    return root


def _answer_spans(trajectory: Trajectory) -> set[int]:
    """Return the spans whose text is the answer: text of the trunk after the last join."""
    answer: set[int] = set()
    for i in reversed(range(len(trajectory.spans))):
        if trajectory.spans[i].role != "text" or trajectory.spans[i].path != ():
            break
        answer.add(i)
    return answer


def _add_block(root: Tree, block: Block) -> None:
    panels = []
    for branch in block.branches:
        label = FINISH_LABELS.get(branch.finish or "", "")
        panels.append(
            Panel(
                Text(printable(branch.text.strip())),
                title=_panel_title(
                    f"{branch.number}: {branch.outline}" if branch.outline else str(branch.number)
                ),
                subtitle=_panel_title(label, "yellow") if label else None,
                width=PANEL_WIDTH,
            )
        )
    node = root.add(Text(f"fork into {len(panels)}", style="bold magenta"))
    node.add(Columns(panels))
    if block.conclusion:
        node.add(Text.assemble(("conclusion  ", "bold magenta"), printable(block.conclusion)))


def _panel_title(title: str, style: str = "cyan") -> Text:
    text = Text(" ".join(printable(title).split()), style=style)
    text.truncate(PANEL_WIDTH - 6, overflow="ellipsis")  # rich itself cuts a title without a sign
    return text


def render_summary(trajectories: dict[str, Trajectory]) -> FittedTable:
    """Render a table with one row per trajectory.

    Args:
        trajectories: The trajectories by title. Tokens and seconds are those that the engine reported.
    """
    metrics = [trajectory.metrics() for trajectory in trajectories.values()]
    calls = [trajectory.calls for trajectory in trajectories.values()]
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
