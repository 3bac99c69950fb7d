"""Renders a trajectory as a tree for the terminal, and its metrics as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from sgl_apr.trajectory.blocks import Block
from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.printable import printable

MAX_CACHE_SHARES = 4  # branches whose cached share is listed
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
                title=Text(printable(f"{branch.number}: {branch.outline}"), style="cyan"),
                subtitle=Text(label, style="yellow") if label else None,
                width=38,
            )
        )
    node = root.add(Text(f"fork into {len(panels)}", style="bold magenta"))
    node.add(Columns(panels))
    if block.conclusion:
        node.add(Text.assemble(("conclusion  ", "bold magenta"), printable(block.conclusion)))


def render_summary(trajectories: dict[str, Trajectory]) -> Table:
    """Render a table with one row per trajectory.

    Args:
        trajectories: The trajectories by title. Tokens and seconds are those that the engine reported.
    """
    table = Table(title="Metrics")
    table.add_column("question", max_width=32)
    names = (
        "blocks",
        "branches",
        "total tokens",
        "critical path",
        "acceleration",
        "cached / shared",
        "wall s",
    )
    for name in names:
        table.add_column(name, justify="right")
    for title, t in trajectories.items():
        m = t.metrics()
        table.add_row(
            Text(printable(title)),
            str(m.blocks),
            str(m.branches),
            str(m.total),
            str(m.critical_path),
            f"{m.acceleration:.0%}",
            _cached(t.calls),
            f"{m.wall_s:.1f}",
        )
    return table


def _cached(calls: Sequence[Call]) -> str:
    """Return how much of the shared prefix was cached, for each branch, or as counts if there are many branches."""
    shares = Counter(f"{c.cached_tokens}/{c.shared_tokens}" for c in calls if c.phase == "branch")
    if shares.total() <= MAX_CACHE_SHARES:
        return ", ".join(shares.elements())
    listed = [f"{branches} x {share}" for share, branches in shares.most_common(MAX_CACHE_SHARES)]
    return ", ".join(listed) + (", ..." if len(shares) > MAX_CACHE_SHARES else "")


def render_report(trajectory: Trajectory, title: str, max_blocks: int | None = None) -> RenderableType:
    """Render the tree of a trajectory, as `render_tree` does, and its metrics."""
    return Group(render_tree(trajectory, title, max_blocks), render_summary({title: trajectory}))
