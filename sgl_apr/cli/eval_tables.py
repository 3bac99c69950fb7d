"""Tables of evaluations and comparisons for the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from rich.console import Console

from sgl_apr.evaluation.compare import MethodPair
from sgl_apr.evaluation.metrics import MethodResults
from sgl_apr.views.fitted_table import Column, FittedTable
from sgl_apr.views.printable import printable

COMPLETE_WIDTH = 220  # columns that fit every table, for files, pipes and --wide
ALL_COLUMNS = "--wide or --json"
# Name, rank (the highest is left out first), and the text of a row. The method and its accuracy always stay.
RESULT_COLUMNS: Sequence[tuple[str, int, Callable[[MethodResults], str]]] = (
    ("accuracy", 0, lambda row: f"{row.accuracy:.1%}"),
    ("claims right", 1, lambda row: _share(row.claim_precision)),
    ("95% CI", 3, lambda row: "{:.1%} - {:.1%}".format(*row.ci95)),
    ("total tokens", 2, lambda row: f"{row.mean(lambda a: a.tokens):.0f}"),
    ("critical path", 1, lambda row: f"{row.mean(lambda a: a.critical_path):.0f}"),
    ("context", 6, lambda row: f"{row.mean(lambda a: a.context):.0f}"),
    ("forked", 5, lambda row: f"{row.mean(lambda a: bool(a.forks)):.0%}"),
    ("alike", 10, lambda row: _share(row.mean_known(lambda a: a.redundancy))),
    ("answers", 11, lambda row: _share(row.mean_known(lambda a: a.diversity))),
    ("calls", 7, lambda row: f"{row.mean(lambda a: a.calls):.1f}"),
    ("cached", 8, lambda row: f"{row.cached_share:.0%}"),
    ("seconds", 4, lambda row: f"{row.wall_s:.1f}"),
    ("one by one", 9, lambda row: f"{row.alone[1] / row.alone[0]:.1f}x" if row.alone else "-"),
)

# Shown if any attempt called a tool.
TOOL_COLUMNS: Sequence[tuple[str, int, Callable[[MethodResults], str]]] = (
    ("tool calls", 12, lambda row: f"{row.mean(lambda a: a.tool_calls):.1f}"),
    ("tool seconds", 14, lambda row: f"{row.mean(lambda a: a.tool_s):.2f}"),
    ("tools in sequence", 13, lambda row: f"{row.mean(lambda a: a.critical_tool_s):.2f}"),
)


def print_results(task: str, rows: Sequence[MethodResults], several: bool, wide: bool = False) -> None:
    """Print a table with a row for each method, and notes below, such as why a method cannot run.

    Args:
        task: Name of the task.
        rows: Results of the methods.
        several: Whether other tasks have tables too, so that each needs a title.
        wide: Whether all columns are printed, however wide the terminal is.
    """
    has_tools = any(attempt.tool_calls for row in rows for attempt in row.attempts)
    columns = [Column("method", [row.method for row in rows], left=True)]
    columns += [
        Column(name, [text(row) if row.attempts else "-" for row in rows], rank)
        for name, rank, text in (*RESULT_COLUMNS, *(TOOL_COLUMNS if has_tools else ()))
    ]
    console = _console(wide)
    console.print(FittedTable(columns, task if several else None, ALL_COLUMNS))
    for row in rows:
        sequential, parallel = (
            (row.mean_known(lambda a: a.sequential_s), row.mean_known(lambda a: a.parallel_s))
            if row.attempts
            else (None, None)
        )
        if sequential and parallel:
            took = row.mean_known(lambda a: a.took_s) or 0.0
            times = f"{sequential:.2f} s predicted without forks, {parallel:.2f} s with its forks, {took:.2f} s measured"
            console.print(f"{row.method}: {times}", markup=False, highlight=False, soft_wrap=True)
    notes = dict[str, list[str]]()
    for row in rows:
        notes.setdefault(row.label or row.reason, []).append(row.method)
    for note, methods in notes.items():
        if note != "exact":
            console.print(
                printable(f"{', '.join(methods)}: {note}"), markup=False, highlight=False, soft_wrap=True
            )


def print_comparisons(pairs: Sequence[MethodPair], wide: bool = False) -> None:
    """Print a row for each pair; differences are the second minus the first, with 95% intervals.

    Columns of tools are shown if any attempt called one.

    Args:
        pairs: The compared evaluations.
        wide: Whether all columns are printed, however wide the terminal is.
    """
    by_tokens = [pair.mean_difference(lambda a: a.tokens) for pair in pairs]
    by_path = [pair.mean_difference(lambda a: a.critical_path) for pair in pairs]
    columns = [
        Column("first", [pair.names[0] for pair in pairs], shrinks=True),
        Column("second", [pair.names[1] for pair in pairs], shrinks=True),
        Column("problems", [str(len(pair.results[0].attempts)) for pair in pairs], 3),
        Column("accuracy", [" / ".join(f"{row.accuracy:.1%}" for row in pair.results) for pair in pairs], 2),
        Column(
            "difference",
            [
                "{:+.1%} ({:+.1%} to {:+.1%})".format(pair.comparison.difference, *pair.comparison.ci95)
                for pair in pairs
            ],
        ),
        Column("p", [f"{pair.comparison.p:.2g}" for pair in pairs], 1),
        Column("total tokens", [_difference(*by) for by in by_tokens], 5),
        Column("critical path", [_difference(*by) for by in by_path], 4),
    ]
    if any(pair.has_tool_calls for pair in pairs):
        calls = [pair.mean_difference(lambda a: a.tool_calls) for pair in pairs]
        seconds = [pair.mean_difference(lambda a: a.tool_s) for pair in pairs]
        columns += [
            Column("tool calls", [_difference(*by) for by in calls], 6),
            Column("tool seconds", [_difference(*by, digits=2) for by in seconds], 7),
        ]
    _console(wide).print(FittedTable(columns, all_columns=ALL_COLUMNS))


def _difference(value: float, interval: tuple[float, float], digits: int = 1) -> str:
    low, high = interval
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _console(wide: bool) -> Console:
    """A console as wide as the terminal. Without a terminal, or with `wide`, all columns fit, unless COLUMNS is set."""
    console = Console()
    if wide or not (console.is_terminal or "COLUMNS" in os.environ):
        return Console(width=COMPLETE_WIDTH)
    return console
