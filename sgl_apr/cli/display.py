"""How subcommands show a trajectory in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sgl_apr.views.printable import printable

if TYPE_CHECKING:
    from sgl_apr.trajectory.trajectory import Trajectory

MAX_BLOCKS = 500  # of one trajectory


def print_trajectory(trajectory: Trajectory, title: str, metrics: bool = True) -> None:
    """Print the tree of a trajectory, and with `metrics` a table of its metrics, which needs token counts.

    Of a trajectory with thousands of blocks the first are shown: a terminal takes seconds for every thousand.
    """
    from rich.console import Console

    from sgl_apr.views.tree import render_report, render_tree

    render = render_report if metrics else render_tree
    Console().print(render(trajectory, title, MAX_BLOCKS))


def print_error(message: object) -> None:
    """Print an error to stderr. It may quote a model, a file or a server."""
    print(f"sgl-apr: error: {printable(str(message))}", file=sys.stderr)
