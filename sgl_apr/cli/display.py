"""How subcommands show a trajectory in the terminal."""

from __future__ import annotations

import sys

from sgl_apr.trajectory.trajectory import Trajectory
from sgl_apr.views.printable import printable


def print_trajectory(trajectory: Trajectory, title: str, metrics: bool = True) -> None:
    """Print the tree of a trajectory, and with `metrics` a table of its metrics, which needs token counts."""
    from rich.console import Console

    from sgl_apr.views.tree import render_report, render_tree

    Console().print(render_report(trajectory, title) if metrics else render_tree(trajectory, title))


def print_error(message: object) -> None:
    """Print an error to stderr. It may quote a model, a file or a server."""
    print(f"sgl-apr: error: {printable(str(message))}", file=sys.stderr)
