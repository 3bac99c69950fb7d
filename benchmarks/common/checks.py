"""The output and the exit status of a benchmark that compares its results with bars."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console


def finish(
    result: dict[str, Any],
    missed: Sequence[str],
    show: Callable[[dict[str, Any]], None],
    options: argparse.Namespace,
) -> int:
    """Print the result on stdout and each missed bar on stderr.

    Args:
        result: What was measured.
        missed: One sentence for each bar that was missed.
        show: Prints the result for people; used without `options.json`.
        options: Has the flags `json` and `check`.

    Returns:
        The exit status: 1 if `options.check` is set and a bar was missed, else 0.
    """
    result = result | {"missed": list(missed)}
    print(json.dumps(result)) if options.json else show(result)
    for bar in missed:
        Console(stderr=True).print(f"[red]missed: {bar}")
    return int(options.check and bool(missed))
