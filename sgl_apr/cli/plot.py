"""`sgl-apr plot`: which evaluations are drawn, and into which file; nothing is computed here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError

AXES = ("context", "tokens", "critical_path", "wall")


def add_commands(commands: Any) -> None:
    """Add `plot` to an argparse parser."""
    parser = commands.add_parser(
        "plot",
        help="accuracy against context, tokens, critical path and wall time, as a figure",
        description="Draws what `sgl-apr eval ... -o DIRECTORY` has kept: a panel for each cost, a line for each method "
        "(of several directories, for each directory), each with the 95% bootstrap interval of every point.",
        epilog="examples:\n"
        "  sgl-apr plot out -o figure.pdf\n"
        "  sgl-apr plot runs/eval/sequential runs/eval/parallel -o figure.svg --x context,critical_path",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="RUN_DIR", help="what eval -o has written"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="a .pdf, .svg or .png")
    parser.add_argument(
        "--x",
        metavar="NAME,...",
        help=f"some of {', '.join(AXES)} (default: those that are known of every method)",
    )
    parser.add_argument("--title", default="")
    parser.add_argument("--json", action="store_true", help="print what was drawn as JSON")
    parser.set_defaults(command=_plot)


def _plot(options: argparse.Namespace) -> int:
    from sgl_apr.evaluation.plots import axes_without_data, plot_methods, load_results

    asked = options.x.split(",") if options.x else []
    if wrong := [axis for axis in asked if axis not in AXES]:
        raise AprError(f"--x {wrong[0]!r}, expected some of {', '.join(AXES)}")
    drawn = load_results(options.directories)
    missing = {} if asked else {axis: names for axis in AXES if (names := axes_without_data(drawn, axis))}
    plot_methods(drawn, options.out, options.title, asked)
    for axis, names in missing.items():
        print(f"no panel for {axis}: older versions evaluated {', '.join(names)}", file=sys.stderr)
    if options.json:
        lines = [
            {"name": row.method, "attempts": len(row.attempts), "accuracy": row.accuracy, "ci95": row.ci95}
            for row in drawn
        ]
        panels = asked or [axis for axis in AXES if axis not in missing]
        print(json.dumps({"file": str(options.out), "panels": panels, "lines": lines}))
    else:
        print(options.out)
    return 0
