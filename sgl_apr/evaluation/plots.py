"""Pictures: the share that is solved within a context, tokens, a critical path, seconds; and how a training run went."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from operator import attrgetter
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError
from sgl_apr.evaluation.metrics import RESAMPLES, AttemptMetrics, MethodResults
from sgl_apr.evaluation.store import RUN_FILE, read_results

AXIS_LABELS = {
    "context": "longest context (tokens)",
    "tokens": "total tokens",
    "critical_path": "critical path (tokens)",
    "wall": "wall time (s)",
}
AXIS_FIELDS = {"wall": "took_s"}  # of an attempt, where an axis has another name
SUFFIXES = (".pdf", ".svg", ".png")
# Told apart by the colour-blind and, by their strokes, in print without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("solid", "dashed", "dashdot", "dotted")
# As a paper takes it: the size of its captions, a face like its text's, and fonts that are embedded as fonts.
PAPER_STYLE = {
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9, "legend.fontsize": 8, "axes.linewidth": 0.6,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "pdf.fonttype": 42, "svg.hashsalt": "sgl_apr",
}  # fmt: skip


def load_results(directories: Sequence[Path]) -> list[MethodResults]:
    """The methods of some evaluations; of several, each has the name of its directory. Raises `AprError` for one without attempts."""
    found, names = list[MethodResults](), [directory.name for directory in directories]
    for directory in directories:
        if not (own := read_results(directory)):
            raise AprError(f"{directory / RUN_FILE} holds no attempt, expected at least one")
        place = directory.name if names.count(directory.name) == 1 else directory
        for row in own:
            name = f"{place}" if len(own) == 1 else f"{place}, {row.method}"
            found.append(replace(row, method=name) if len(directories) > 1 else row)
    return found


def attempt_metric(axis: str) -> Callable[[AttemptMetrics], Any]:
    """What an attempt cost; None where that is not known."""
    return attrgetter(AXIS_FIELDS.get(axis, axis))


def solved_share_curve(
    row: MethodResults, of: Callable[[AttemptMetrics], Any]
) -> tuple[list[Any], list[float]]:
    """(limit, share solved within it), a step at every solved problem."""
    limits = sorted(of(a) for a in row.attempts if a.correct)
    return limits, [(k + 1) / len(row.attempts) for k in range(len(limits))]


def bootstrap_band(solved: int, attempts: int) -> tuple[Sequence[float], Sequence[float]]:
    """95% bootstrap bounds of a curve behind none of its steps, behind one, ..., each for itself.

    Every solved one of the attempts is a step.
    """
    import numpy as np

    odds = [1 / attempts] * solved + [1 - solved / attempts]  # what was not solved never counts
    drawn = np.random.default_rng(0).multinomial(attempts, odds, size=RESAMPLES)[:, :solved]
    low, high = np.quantile(drawn.cumsum(axis=1) / attempts, (0.025, 0.975), axis=0)
    return [0.0, *low.tolist()], [0.0, *high.tolist()]


def plot_methods(
    rows: Sequence[MethodResults], path: Path, title: str = "", axes: Sequence[str] = ()
) -> None:
    """One panel for each cost, one line with its band for each row, into a PDF, SVG or PNG.

    axes: some of `LABELS`; by default those that are known of every row. Raises `AprError` for one that is not, for
    rows without attempts, and for another suffix.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if path.suffix not in SUFFIXES:
        raise AprError(
            f"cannot draw a {path.suffix or 'file without a suffix'}, expected {', '.join(SUFFIXES)}"
        )
    if not rows or not all(row.attempts for row in rows):
        raise AprError("nothing to draw, expected attempts of every method")
    panels = axes or [axis for axis in AXIS_LABELS if not axes_without_data(rows, axis)]
    for axis in panels:
        if missing := axes_without_data(rows, axis):
            raise AprError(f"{axis} is not known of {', '.join(missing)}, which older versions evaluated")
    with rc_context(PAPER_STYLE):
        figure: Any = Figure(figsize=(2.35 * len(panels) + 0.4, 2.5), layout="constrained")
        for panel, axis in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
        ):
            _panel(panel, rows, axis)
        figure.axes[0].set_ylabel("solved within it")
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
        figure.suptitle(title)
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)


def axes_without_data(rows: Sequence[MethodResults], axis: str) -> list[str]:
    """The methods of which a cost is not known."""
    return [row.method for row in rows if None in map(attempt_metric(axis), row.attempts)]


def _panel(panel: Any, rows: Sequence[MethodResults], axis: str) -> None:
    of = attempt_metric(axis)
    solved = [solved_share_curve(row, of)[0] for row in rows]
    most = max(of(a) for row in rows for a in row.attempts)
    end = max(map(max, filter(None, solved)), default=most)  # behind it all lines are flat
    for row, steps, colour, stroke in zip(rows, solved, cycle(COLOURS), cycle(LINE_STYLES), strict=False):
        attempts = len(row.attempts)
        behind = {0: 0} | {cost: k for k, cost in enumerate(steps, 1)} | {end: len(steps)}
        low, high = bootstrap_band(len(steps), attempts)
        panel.fill_between(
            [*behind], [low[k] for k in behind.values()], [high[k] for k in behind.values()], step="post", color=colour,
            alpha=0.2, linewidth=0,
        )  # fmt: skip
        shares = [k / attempts for k in behind.values()]
        label = f"{row.method} ({row.accuracy + 1e-9:.1%})"  # a half is rounded up, as people do
        panel.step(
            [*behind], shares, where="post", color=colour, linestyle=stroke, label=label, linewidth=1.2
        )
    panel.set_xlabel(AXIS_LABELS[axis])
    panel.set_xlim(0, 1.02 * end or 1)
    panel.set_ylim(0, 1)
    panel.grid(alpha=0.25, linewidth=0.5)


def plot_training_log(log: Path, path: Path, names: Sequence[str]) -> None:
    """Some numbers of a training log, one panel each, by step."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure: Any = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot([line["step"] for line in lines], [line[name] for line in lines])
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " "))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
