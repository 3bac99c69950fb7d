"""How a benchmark with bars ends: what it found on stdout, what it missed on stderr, and its status."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console


def ended(
    found: dict[str, Any],
    missed: Sequence[str],
    show: Callable[[dict[str, Any]], None],
    options: argparse.Namespace,
) -> int:
    """With --json one object, else what `show` prints; status 1 if --check and a bar is missed."""
    found = found | {"missed": list(missed)}
    print(json.dumps(found)) if options.json else show(found)
    for bar in missed:
        Console(stderr=True).print(f"[red]missed: {bar}")
    return int(options.check and bool(missed))
