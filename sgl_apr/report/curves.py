"""Pictures: accuracy within a context, within tokens, within a critical path; and how a training run went."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sgl_apr.tasks.evaluation import Measured, Row

AXES: tuple[tuple[str, Callable[[Measured], int]], ...] = (
    ("longest context, tokens", lambda a: a.context),
    ("total tokens", lambda a: a.tokens),
    ("critical path, tokens", lambda a: a.critical_path),
)


def curve(row: Row, of: Callable[[Measured], int]) -> tuple[list[int], list[float]]:
    """(limit, share solved within it), a step at every solved problem."""
    limits = sorted(of(a) for a in row.attempts if a.correct)
    return limits, [(k + 1) / len(row.attempts) for k in range(len(limits))]


def draw(rows: Sequence[Row], path: Path, title: str = "") -> None:
    """One panel for each cost, one line for each row, into a PNG, SVG or PDF."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, of) in zip(figure.subplots(1, len(AXES), sharey=True), AXES, strict=True):
        for row in rows:
            axes.step(*curve(row, of), where="post", label=f"{row.method} ({row.accuracy:.1%})")
        axes.set_xlabel(f"at most so many tokens: {name.removesuffix(', tokens')}")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("solved")
    figure.axes[-1].legend(loc="lower right", fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def draw_log(log: Path, path: Path, names: Sequence[str]) -> None:
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
