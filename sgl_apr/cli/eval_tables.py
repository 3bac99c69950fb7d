"""Tables of evaluations and comparisons for the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sgl_apr.evaluation.compare import MethodPair
from sgl_apr.evaluation.metrics import MethodResults
from sgl_apr.views.printable import printable

PIPE_WIDTH = 150  # columns


def print_results(task: str, rows: Sequence[MethodResults], several: bool) -> None:
    """Print a table with a row for each method, and notes below, such as why a method cannot run.

    Args:
        task: Name of the task.
        rows: Results of the methods.
        several: Whether other tasks have tables too, so that each needs a title.
    """
    table = Table(
        "method", "accuracy", "95% CI", "total tokens", "critical path", "context", "forked", "alike", "answers", "calls",
        "cached", "wall s", "one by one", title=escape(task) if several else None,
    )  # fmt: skip
    notes = dict[str, list[str]]()
    for row in rows:
        notes.setdefault(row.label or row.reason, []).append(row.method)
        if not row.attempts:
            table.add_row(row.method, *["-"] * (len(table.columns) - 1))
            continue
        low, high = row.ci95
        alike, answers = row.mean_known(lambda a: a.redundancy), row.mean_known(lambda a: a.diversity)
        table.add_row(
            row.method, f"{row.accuracy:.1%}", f"{low:.1%} - {high:.1%}", f"{row.mean(lambda a: a.tokens):.0f}",
            f"{row.mean(lambda a: a.critical_path):.0f}", f"{row.mean(lambda a: a.context):.0f}",
            f"{row.mean(lambda a: bool(a.forks)):.0%}", _share(alike), _share(answers), f"{row.mean(lambda a: a.calls):.1f}",
            f"{row.cached_share:.0%}", f"{row.wall_s:.1f}", f"{row.alone[1] / row.alone[0]:.1f}x" if row.alone else "-",
        )  # fmt: skip
    console = _console()
    console.print(table)
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
    for note, methods in notes.items():
        if note != "exact":
            console.print(
                printable(f"{', '.join(methods)}: {note}"), markup=False, highlight=False, soft_wrap=True
            )


def print_comparisons(pairs: Sequence[MethodPair]) -> None:
    """Print a row for each pair; differences are the second minus the first, with 95% intervals."""
    table = Table(
        "first", "second", "problems", "accuracy", "difference", "p", "total tokens", "critical path"
    )
    for pair in pairs:
        compared, first = pair.comparison, pair.results[0]
        low, high = compared.ci95
        table.add_row(
            *map(escape, pair.names), str(len(first.attempts)), " / ".join(f"{row.accuracy:.1%}" for row in pair.results),
            f"{compared.difference:+.1%} ({low:+.1%} to {high:+.1%})", f"{compared.p:.2g}",
            *(f"{by:+.1f} ({low:+.1f} to {high:+.1f})" for by, (low, high) in (
                pair.mean_difference(lambda a: a.tokens), pair.mean_difference(lambda a: a.critical_path)
            )),
        )  # fmt: skip
    _console().print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _console() -> Console:
    """A console that is wide enough for the tables in a file or a pipe, unless COLUMNS sets its width."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)
