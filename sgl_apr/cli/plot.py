"""`sgl-apr plot`: plot evaluations into a file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError

AXES = ("context", "tokens", "critical_path", "wall")


def add_command(commands: Any) -> None:
    """Add `plot` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "plot",
        help="plot accuracy against context, tokens, critical path and wall time",
        description="Plots the results of `sgl-apr eval ... -o DIRECTORY`: one panel for each axis, one line for each method "
        "(with several directories, for each directory), with the 95% bootstrap interval of every point. An evaluation with "
        "--sweep has one panel for each limit that was swept.",
        epilog="examples:\n"
        "  sgl-apr plot out -o figure.pdf\n"
        "  sgl-apr plot sweep -o curves.svg                       # of `sgl-apr eval --sweep tokens=256,512 ... -o sweep`\n"
        "  sgl-apr plot runs/eval/sequential runs/eval/parallel -o figure.svg --x context,critical_path",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories", nargs="+", type=Path, metavar="RUN_DIR", help="a directory that eval -o wrote"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="a .pdf, .svg or .png")
    parser.add_argument(
        "--x",
        metavar="NAME,...",
        help=f"some of {', '.join(AXES)} (default: those that every method has values for)",
    )
    parser.add_argument("--title", default="", help="title of the figure")
    parser.add_argument("--json", action="store_true", help="print what was plotted as JSON")
    parser.set_defaults(command=_plot)


def _plot(options: argparse.Namespace) -> int:
    from sgl_apr.evaluation.sweep import sweep_directories

    if any(map(sweep_directories, options.directories)):
        return _plot_sweep(options)
    from sgl_apr.evaluation.plots import axes_without_data, load_results, plot_methods

    axes = options.x.split(",") if options.x else []
    if wrong := [axis for axis in axes if axis not in AXES]:
        raise AprError(f"--x {wrong[0]!r}, expected some of {', '.join(AXES)}")
    results = load_results(options.directories)
    missing = {} if axes else {axis: names for axis in AXES if (names := axes_without_data(results, axis))}
    plot_methods(results, options.out, options.title, axes)
    for axis, names in missing.items():
        print(f"no panel for {axis}: an older version evaluated {', '.join(names)}", file=sys.stderr)
    if options.json:
        lines = [
            {"name": row.method, "attempts": len(row.attempts), "accuracy": row.accuracy, "ci95": row.ci95}
            for row in results
        ]
        panels = axes or [axis for axis in AXES if axis not in missing]
        print(json.dumps({"file": str(options.out), "panels": panels, "lines": lines}))
    else:
        print(options.out)
    return 0


def _plot_sweep(options: argparse.Namespace) -> int:
    from sgl_apr.evaluation.plots import plot_sweep
    from sgl_apr.evaluation.sweep import read_sweep

    if len(options.directories) > 1 or options.x:
        raise AprError(
            "the curves of a sweep are over the limit that was swept, expected one directory and no --x"
        )
    levels = read_sweep(options.directories[0])
    plot_sweep(levels, options.out, options.title)
    if options.json:
        lines = [
            {"name": row.method, "limit": level.limit, "value": level.value, "attempts": len(row.attempts)}
            | {"accuracy": row.accuracy, "ci95": row.ci95}
            for level, rows in levels.items()
            for row in rows
        ]
        panels = list(dict.fromkeys(level.limit for level in levels))
        print(json.dumps({"file": str(options.out), "panels": panels, "lines": lines}))
    else:
        print(options.out)
    return 0
