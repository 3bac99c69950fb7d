"""Time from the command `sgl-apr serve` to the line that says that the server is ready, as a whole and by phase.

Servers of the built-in model start one after the other, with everything that shortens a start, and without each part of
it. All variants take turns, so that the load of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware, versions
from sgl_apr.server import constants
from sgl_apr.server.launch.preflight import free_port
from sgl_apr.training.models import locate_model

ROOT = Path(__file__).resolve().parents[1]
BARS = {"serve": 20.0, "demo": 35.0}  # seconds, medians
TIMEOUT_S = 300.0
# Each phase ends with a line of the server's log.
PHASES = {
    "imports": "server_args=",
    "weights": "Load weight end",
    "KV pool and scheduler": "Engine startup timings",
    "HTTP server": "Uvicorn running on",
    "first request": "The server is fired up",
    "grammars and self-check of joins": "sgl-apr ready:",
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "garbage collected while importing": (constants.PAUSE_GC_ENV,),
    "flashinfer imported": (constants.SKIP_FLASHINFER_ENV,),
    "all models imported": (constants.ONE_MODEL_MODULE_ENV,),
    "mask kernel of torch": (constants.MASK_KERNEL_ENV,),
    "SGLang's wait before the first request": (constants.QUICK_WARMUP_ENV,),
}
VARIANTS["none of these"] = tuple(variable for off in VARIANTS.values() for variable in off)
VARIANTS["none of these, and spawn"] = (*VARIANTS["none of these"], constants.FORK_START_ENV)
EXAMPLES = """examples:
  python -m benchmarks.startup --json --check
  python -m benchmarks.startup --variants default "none of these" --runs 5
  python -m benchmarks.startup --demo --variants default"""


def phase_seconds(started: float, lines: Sequence[tuple[float, str]]) -> dict[str, float]:
    """Return the seconds of each phase.

    Args:
        started: When the command was started.
        lines: The time and the text of each line of the log.

    Raises:
        ValueError: The log has no line that ends a phase.
    """
    seconds: dict[str, float] = {}
    before = started
    for name, text in PHASES.items():
        at = next((at for at, line in lines if text in line), None)
        if at is None:
            last = lines[-1][1].strip() if lines else "nothing"
            raise ValueError(f"the server was not ready: its log has no line {text!r} and ends with {last!r}")
        seconds[name] = max(0.0, at - before)
        before = max(before, at)
    return seconds


@dataclass(frozen=True, slots=True)
class Start:
    """A start of a server.

    Attributes:
        phases: The seconds of each phase.
        cpu_s: CPU seconds of all processes until the server is ready.
    """

    phases: dict[str, float]
    cpu_s: float


def start_server(off: Sequence[str]) -> Start:
    """Start a server, and stop it when it is ready.

    Args:
        off: The environment variables that are set to "0".
    """
    command = [
        str(Path(sys.executable).with_name("sgl-apr")),
        "serve",
        "--model",
        str(locate_model("builtin")),
    ]
    switches = {variable for variables in VARIANTS.values() for variable in variables}
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    lines: list[tuple[float, str]] = []
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, "--port", str(free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | dict.fromkeys(off, "0"),
    )
    assert process.stdout is not None
    cpu_s = 0.0
    try:
        for line in process.stdout:
            lines.append((time.monotonic(), line))
            if "sgl-apr ready:" in line or lines[-1][0] - started > TIMEOUT_S:
                cpu_s = tree_cpu_seconds(process.pid)
                break
    finally:
        process.terminate()
        process.communicate(timeout=60)
    return Start(phase_seconds(started, lines), cpu_s)


def tree_cpu_seconds(pid: int) -> float:
    """Return the CPU seconds so far of a process and of those that it has started."""
    total = 0.0
    for process in (parent := psutil.Process(pid), *parent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def row(name: str, starts: Sequence[Start]) -> dict[str, Any]:
    """Return the median, the shortest and the longest time of a variant, and the medians of its phases."""
    totals = [sum(start.phases.values()) for start in starts]
    phases = {phase: round(statistics.median(start.phases[phase] for start in starts), 2) for phase in PHASES}
    return {
        "variant": name,
        "off": list(VARIANTS[name]),
        "runs": len(starts),
        "seconds": round(statistics.median(totals), 2),
        "min_s": round(min(totals), 2),
        "max_s": round(max(totals), 2),
        "cpu_s": round(statistics.median(start.cpu_s for start in starts), 2),
        "phases": phases,
    }


def time_demo(runs: int) -> dict[str, Any]:
    """Return the seconds that `make demo` takes in an environment that is ready."""
    seconds = []
    for _ in range(runs):
        started = time.monotonic()
        subprocess.run(
            ["make", "demo"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        seconds.append(time.monotonic() - started)
    return {
        "runs": runs,
        "seconds": round(statistics.median(seconds), 2),
        "min_s": round(min(seconds), 2),
        "max_s": round(max(seconds), 2),
    }


def show(result: dict[str, Any]) -> None:
    table = Table("variant", "seconds", "shortest", "longest", "CPU seconds", *PHASES)
    for entry in result["rows"]:
        cells = [
            entry["variant"],
            entry["seconds"],
            entry["min_s"],
            entry["max_s"],
            *entry["phases"].values(),
        ]
        table.add_row(*map(str, cells))
    Console().print(table)
    if "demo" in result:
        print(f"make demo: {result['demo']['seconds']} s")


def missed(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each bar that was missed."""
    seconds = {entry["variant"]: entry["seconds"] for entry in result["rows"]}
    measured = {"serve": seconds.get("default"), "demo": result.get("demo", {}).get("seconds")}
    return [
        f"{name} takes {measured[name]} s, expected at most {bar:g}"
        for name, bar in BARS.items()
        if (value := measured[name]) is not None and value > bar
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, or JSON; with --check, status 1 if a bar is missed."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=kind)
    add = parser.add_argument
    add("--runs", type=int, default=3, help="starts of each variant (default: %(default)s)")
    add(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=", ".join(VARIANTS),
    )
    add("--demo", action="store_true", help="time `make demo` too")
    add("--json", action="store_true", help="one JSON object on stdout instead of a table")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args(argv)
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: expected at least 1")
    names = list(dict.fromkeys(options.variants))
    starts: dict[str, list[Start]] = {name: [] for name in names}
    turns = [name for _ in range(options.runs) for name in names]
    for name in track(turns, "starts", console=Console(stderr=True)):
        starts[name].append(start_server(VARIANTS[name]))
    result: dict[str, Any] = {"rows": [row(name, starts[name]) for name in names]}
    if options.demo:
        result["demo"] = time_demo(options.runs)
    result |= {"model": "builtin", "hardware": hardware(), "load": os.getloadavg()[0]}
    result["versions"] = versions("sgl-apr", "sglang", "torch", "transformers")
    return finish(result, missed(result), show, options)


if __name__ == "__main__":
    sys.exit(main())
