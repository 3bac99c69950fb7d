"""Figures: the share of problems solved within a limit, with confidence bands; and the curves of a training run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from math import ceil
from operator import attrgetter
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError, require_extra
from sgl_apr.evaluation.metrics import RESAMPLES, AttemptMetrics, MethodResults
from sgl_apr.evaluation.store import RUN_FILE, describe_left_out, read_comparable_results
from sgl_apr.evaluation.sweep import LIMITS, SweepLevel

log = logging.getLogger(__name__)

AXIS_LABELS = {
    "context": "longest context (tokens)",
    "tokens": "total tokens",
    "critical_path": "critical path (tokens)",
    "wall": "wall time (s)",
}
AXIS_FIELDS = {"wall": "took_s"}  # fields of `AttemptMetrics` that are not named like their axis
SUFFIXES = (".pdf", ".svg", ".png")
# Readers who are colour-blind can tell the colours apart; the line styles still differ in print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MAX_BANDS = 6  # more bands hide one another
LEGEND_COLUMN, LEGEND_ROW = 1.4, 0.17  # inches of an entry
LINE_STYLES = ("solid", "dashed", "dashdot", "dotted")
# The style of a paper: caption-sized text, a serif face, fonts embedded as fonts.
PAPER_STYLE = {
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9, "legend.fontsize": 8, "axes.linewidth": 0.6,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "pdf.fonttype": 42, "svg.hashsalt": "sgl_apr",
}  # fmt: skip


def load_results(directories: Sequence[Path]) -> list[MethodResults]:
    """The methods of some evaluations, those of one directory on the problems that all of them attempted.

    With several directories each method is named after its directory. Problems that are left out are counted in a
    warning of the log.

    Args:
        directories: Directories that `sgl-apr eval -o` wrote.

    Raises:
        AprError: If a directory has no attempt, or its methods have no problem in common.
    """
    results, names = list[MethodResults](), [directory.name for directory in directories]
    for directory in directories:
        rows, left_out = read_comparable_results(directory)
        if not rows:
            raise AprError(f"{directory / RUN_FILE} has no attempt, expected at least one")
        if left_out:
            log.warning("%s: %s", directory, describe_left_out(left_out, [row.method for row in rows]))
        label = directory.name if names.count(directory.name) == 1 else directory
        for row in rows:
            name = f"{label}" if len(rows) == 1 else f"{label}, {row.method}"
            results.append(replace(row, method=name) if len(directories) > 1 else row)
    return results


def attempt_metric(axis: str) -> Callable[[AttemptMetrics], Any]:
    """A function that reads the value of an attempt on an axis of `AXIS_LABELS`; None where it was not recorded."""
    return attrgetter(AXIS_FIELDS.get(axis, axis))


def solved_share_curve(
    row: MethodResults, metric: Callable[[AttemptMetrics], Any]
) -> tuple[list[Any], list[float]]:
    """Limits in ascending order, and the share of problems solved within each; one step per solved problem."""
    limits = sorted(metric(a) for a in row.attempts if a.correct)
    return limits, [(k + 1) / len(row.attempts) for k in range(len(limits))]


def bootstrap_band(solved: int, attempts: int) -> tuple[Sequence[float], Sequence[float]]:
    """Pointwise 95% bootstrap bounds of a solved-share curve.

    Args:
        solved: Solved problems, each of which is one step of the curve.
        attempts: All problems.

    Returns:
        The lower and the upper bound after 0, 1, ..., `solved` steps.
    """
    import numpy as np

    odds = [1 / attempts] * solved + [1 - solved / attempts]  # the last entry: drawn, but not solved
    drawn = np.random.default_rng(0).multinomial(attempts, odds, size=RESAMPLES)[:, :solved]
    low, high = np.quantile(drawn.cumsum(axis=1) / attempts, (0.025, 0.975), axis=0)
    return [0.0, *low.tolist()], [0.0, *high.tolist()]


def plot_methods(
    rows: Sequence[MethodResults], path: Path, title: str = "", axes: Sequence[str] = ()
) -> None:
    """Plot the share of problems solved within a limit: one panel per axis, one line with its band per method.

    Args:
        rows: Results of the methods.
        path: A PDF, SVG or PNG file to write.
        title: Title of the figure.
        axes: Some of `AXIS_LABELS`; by default those that every method has values for.

    Raises:
        AprError: For another suffix, for methods without attempts, and for an axis that a method has no values for.
    """
    matplotlib, Figure = _matplotlib()
    _check_suffix(path)
    if not rows or not all(row.attempts for row in rows):
        raise AprError("nothing to draw, expected attempts of every method")
    panels = axes or [axis for axis in AXIS_LABELS if not axes_without_data(rows, axis)]
    for axis in panels:
        if missing := axes_without_data(rows, axis):
            raise AprError(f"{', '.join(missing)} has no values for {axis}: an older version evaluated it")
    with matplotlib.rc_context(PAPER_STYLE):
        figure: Any = Figure(figsize=(2.35 * len(panels) + 0.4, 2.5), layout="constrained")
        for panel, axis in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
        ):
            _panel(panel, rows, axis)
        figure.axes[0].set_ylabel("solved within it")
        _finish(figure, path, title)


def plot_sweep(levels: Mapping[SweepLevel, Sequence[MethodResults]], path: Path, title: str = "") -> None:
    """Plot the share of problems solved under each value of a limit: one panel per limit, one line per method.

    Lines have bands, their 95% intervals, where they can be told apart: with at most six methods.

    Args:
        levels: Results by limit and value. Methods without attempts have no line.
        path: A PDF, SVG or PNG file to write.
        title: Title of the figure.

    Raises:
        AprError: For another suffix, and where there is no attempt.
    """
    matplotlib, Figure = _matplotlib()
    _check_suffix(path)
    methods = dict.fromkeys(row.method for rows in levels.values() for row in rows if row.attempts)
    limits = dict.fromkeys(level.limit for level, rows in levels.items() if any(row.attempts for row in rows))
    if not methods:
        raise AprError("nothing to draw, expected attempts of at least one method")
    with matplotlib.rc_context(PAPER_STYLE):
        width = (3.2 if len(methods) <= MAX_BANDS else 4.4) * len(limits) + 0.4
        height = 2.2 + LEGEND_ROW * ceil(len(methods) / _legend_columns(width, len(methods)))
        figure: Any = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(1, len(limits), sharey=True, squeeze=False)[0]
        for panel, limit in zip(panels, limits, strict=True):
            _sweep_panel(panel, limit, levels, list(methods))
        panels[0].set_ylabel("solved")
        _finish(figure, path, title)


def _sweep_panel(
    panel: Any, limit: str, levels: Mapping[SweepLevel, Sequence[MethodResults]], methods: Sequence[str]
) -> None:
    values = sorted(level.value for level in levels if level.limit == limit)
    for method, (colour, stroke) in zip(methods, cycle(_line_looks()), strict=False):
        rows = {
            level.value: row
            for level in levels
            if level.limit == limit
            for row in levels[level]
            if row.method == method and row.attempts
        }
        own = sorted(rows)
        panel.plot(
            own, [rows[v].accuracy for v in own], color=colour, linestyle=stroke, marker=".", markersize=4, linewidth=1.2,
            label=method,
        )  # fmt: skip
        if own and len(methods) <= MAX_BANDS:
            low, high = zip(*(rows[v].ci95 for v in own), strict=True)
            panel.fill_between(own, low, high, color=colour, alpha=0.2, linewidth=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.minorticks_off()
    panel.set_xlabel(LIMITS[limit])
    panel.set_ylim(-0.02, 1.02)
    panel.grid(alpha=0.25, linewidth=0.5)


def _legend_columns(width: float, entries: int) -> int:
    """How many columns of a legend fit a figure of so many inches."""
    return max(1, min(4, entries, int(width / LEGEND_COLUMN)))


def _line_looks() -> list[tuple[str, str]]:
    """Colours and line styles in pairs that differ: all colours in one style, then all in the next."""
    return [(colour, stroke) for stroke in LINE_STYLES for colour in COLOURS]


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise AprError(
            f"cannot draw a {path.suffix or 'file without a suffix'}, expected {', '.join(SUFFIXES)}"
        )


def _finish(figure: Any, path: Path, title: str) -> None:
    """Add the legend and the title, and write the file."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = _legend_columns(figure.get_figwidth(), len(names))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)


def axes_without_data(rows: Sequence[MethodResults], axis: str) -> list[str]:
    """The methods that have no values for an axis."""
    return [row.method for row in rows if None in map(attempt_metric(axis), row.attempts)]


def _matplotlib() -> tuple[Any, Any]:
    """Matplotlib and its `Figure`, which only plots need."""
    require_extra("matplotlib", "plot", "plots need matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    return matplotlib, Figure


def _panel(panel: Any, rows: Sequence[MethodResults], axis: str) -> None:
    metric = attempt_metric(axis)
    solved = [solved_share_curve(row, metric)[0] for row in rows]
    largest = max(metric(a) for row in rows for a in row.attempts)
    end = max(map(max, filter(None, solved)), default=largest)  # all lines are flat beyond it
    for row, steps, colour, stroke in zip(rows, solved, cycle(COLOURS), cycle(LINE_STYLES), strict=False):
        attempts = len(row.attempts)
        solved_at = {0: 0} | {limit: k for k, limit in enumerate(steps, 1)} | {end: len(steps)}
        low, high = bootstrap_band(len(steps), attempts)
        panel.fill_between(
            [*solved_at], [low[k] for k in solved_at.values()], [high[k] for k in solved_at.values()], step="post",
            color=colour, alpha=0.2, linewidth=0,
        )  # fmt: skip
        shares = [k / attempts for k in solved_at.values()]
        label = f"{row.method} ({row.accuracy + 1e-9:.1%})"  # rounds a half up
        panel.step(
            [*solved_at], shares, where="post", color=colour, linestyle=stroke, label=label, linewidth=1.2
        )
    panel.set_xlabel(AXIS_LABELS[axis])
    panel.set_xlim(0, 1.02 * end or 1)
    panel.set_ylim(0, 1)
    panel.grid(alpha=0.25, linewidth=0.5)


def plot_training_log(log: Path, path: Path, names: Sequence[str]) -> None:
    """Plot some numbers of a training log by step, one panel each.

    Args:
        log: Lines of JSON with a "step".
        path: The image to write.
        names: Keys of the lines.
    """
    _, Figure = _matplotlib()
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure: Any = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot([line["step"] for line in lines], [line[name] for line in lines])
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
