"""How subcommands show a trajectory in the terminal."""

from __future__ import annotations

from sgl_apr.trajectory.trajectory import Trajectory


def print_trajectory(trajectory: Trajectory, title: str, metrics: bool = True) -> None:
    """Print the tree of a trajectory, and with `metrics` a table of its metrics, which needs token counts."""
    from rich.console import Console

    from sgl_apr.views.tree import render_report, render_tree

    Console().print(render_report(trajectory, title) if metrics else render_tree(trajectory, title))
