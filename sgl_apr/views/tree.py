"""A trajectory as a tree in the terminal, and its figures as a table; it prints nothing by itself."""

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

MAX_CACHE_SHARES = 4  # shares of the cache that are shown
FINISH_LABELS = {
    "length": "cut at its limit",
    "eos": "ended early",
    "aborted": "cut when enough had ended",
    "timeout": "cut at its deadline",
    "failed": "failed",
    "malformed": "left the dialect",
}


def render_tree(trajectory: Trajectory, title: str) -> Tree:
    """Trunk, branches side by side, conclusion and answer. Model text is shown as it is, never as markup."""
    root = Tree(Text(title, style="bold"))
    blocks = {block.path: block for block in trajectory.blocks}
    answering = _answer_spans(trajectory)
    for i, span in enumerate(trajectory.spans):
        if block := blocks.pop(span.path[:1], None):
            _add_block(root, block)
        if span.path == () and span.role == "text" and i not in answering and span.text.strip():
            root.add(Text(span.text.strip()))
    root.add(Text.assemble(("answer  ", "bold green"), trajectory.answer.strip() or "(none)"))
    return root


def _answer_spans(trajectory: Trajectory) -> set[int]:
    """The spans whose text is the answer: trunk text behind the last join."""
    found: set[int] = set()
    for i in reversed(range(len(trajectory.spans))):
        if trajectory.spans[i].role != "text" or trajectory.spans[i].path != ():
            break
        found.add(i)
    return found


def _add_block(root: Tree, block: Block) -> None:
    panels = []
    for branch in block.branches:
        mark = FINISH_LABELS.get(branch.finish or "", "")
        panels.append(
            Panel(
                Text(branch.text.strip()),
                title=Text(f"{branch.number}: {branch.outline}", style="cyan"),
                subtitle=Text(mark, style="yellow") if mark else None,
                width=38,
            )
        )
    node = root.add(Text(f"fork into {len(panels)}", style="bold magenta"))
    node.add(Columns(panels))
    if block.conclusion:
        node.add(Text.assemble(("conclusion  ", "bold magenta"), block.conclusion))


def render_summary(trajectories: dict[str, Trajectory]) -> Table:
    """One row per trajectory, by its title; tokens and seconds as the engine reported them."""
    table = Table(title="What the engine did")
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
            Text(title),
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
    """How much of what branches share came from the cache: of each, or of how many where they are many."""
    found = Counter(f"{c.cached_tokens}/{c.shared_tokens}" for c in calls if c.phase == "branch")
    if found.total() <= MAX_CACHE_SHARES:
        return ", ".join(found.elements())
    shown = [f"{branches} x {share}" for share, branches in found.most_common(MAX_CACHE_SHARES)]
    return ", ".join(shown) + (", ..." if len(found) > MAX_CACHE_SHARES else "")


def render_report(trajectory: Trajectory, title: str) -> RenderableType:
    """The tree and the one-row table together."""
    return Group(render_tree(trajectory, title), render_summary({title: trajectory}))
