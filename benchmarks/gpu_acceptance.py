"""The first minutes on a GPU: whether joins and groups of workers are computed there as they should be, and how fast.

python benchmarks/gpu_acceptance.py [--device cuda|cpu] [--seconds 330] [--only NAME ...] [--json] [--list]

Each configuration of SGLang runs in a process of its own: SGLang's scheduler with its event loop, without a server and
without a network. Each part prints one line of JSON on stdout as soon as it is there, and its progress on stderr. A part that
fails, hangs or takes its process with it does not stop the others. The last line is the verdict. With `--json` everything is
one JSON object at the end instead.

Results are compared with transformers in float32 on the same rounded weights. Exit status: 0 if every part is ok, 1 if
one is not or was not reached in time, 2 if nothing could run. docs/gpu.md explains every line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

if not __package__:  # run as a file, from a checkout that need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.acceptance.configurations import (
    Configuration,
    configurations,
    tree_core_environment,
)
from benchmarks.acceptance.process import Process
from sgl_apr.engine.sglang_names import SUPPORTED_SGLANG

MIN_START_S = 20.0  # with less time left, no scheduler is started
Line = dict[str, Any]


@dataclass
class Report:
    """The lines so far.

    Attributes:
        show: Prints a line.
    """

    show: Callable[[Line], None]
    lines: list[Line] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, configuration: str, line: Line) -> None:
        """Add and print the line of a part, and note its result on stderr."""
        line = {"configuration": configuration, **line}
        self.lines.append(line)
        result = (
            "skipped" if "skipped" in line else {True: "ok", False: "NOT OK"}.get(line["ok"], "not supported")
        )
        progress(f"{configuration}: {line['part']} {result}", self.started)
        self.show(line)

    def verdict(self, device: str) -> Line:
        """Summarize all lines."""
        named: dict[str, list[str]] = {
            kind: [] for kind in ("failed", "not_supported", "not_reached", "skipped")
        }
        for line in self.lines:
            if "skipped" in line:
                kind = "not_reached" if line["ok"] is False else "skipped"
            elif line["ok"] is not True:
                kind = "failed" if line["ok"] is False else "not_supported"
            else:
                continue
            named[kind].append(f"{line['configuration']}: {line['part']}")
        starts = [line["ok"] for line in self.lines if line["part"] == "start"]
        ok = not named["failed"] and not named["not_reached"]
        text = "ok" if ok else "failed" if named["failed"] else "incomplete"
        return {
            "verdict": text if any(starts) else "could not run", "ok": ok and any(starts), "device": device,
            "parts": sum(line["ok"] is True for line in self.lines), **named,
            "seconds": round(time.monotonic() - self.started),
        }  # fmt: skip


def progress(text: str, started: float) -> None:
    print(f"[{time.monotonic() - started:5.0f} s] {text}", file=sys.stderr, flush=True)


class Acceptance:
    """Runs configurations one after the other.

    Args:
        chosen: The configurations.
        device: "cuda" or "cpu".
        seconds: When to end.
        report: Takes the lines.
        capability: The compute capability (major) of the card.
    """

    def __init__(
        self,
        chosen: Sequence[Configuration],
        device: str,
        seconds: float,
        report: Report,
        capability: int | None = None,
    ) -> None:
        self.chosen, self.device, self.report, self.capability = chosen, device, report, capability
        self.ends = time.monotonic() + seconds
        self.environment = tree_core_environment() | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        self.attention: dict[str, str] = {}  # of the configurations that have started
        self._prepared: tuple[str, Process] | None = None

    def run(self, folder: Path) -> None:
        """Run all configurations.

        Args:
            folder: An empty directory for temporary files.
        """
        try:
            for place, configuration in enumerate(self.chosen):
                why = self._unneeded(configuration)
                if why is None:
                    self._run_configuration(configuration, self.chosen[place + 1 :], folder)
                else:
                    self.report.add(configuration.name, {"part": "all", "skipped": why, "ok": None})
        finally:
            if self._prepared:
                self._prepared[1].stop()

    @property
    def _left(self) -> float:
        return self.ends - time.monotonic()

    def _unneeded(self, configuration: Configuration) -> str | None:
        """Why a configuration says nothing on this machine, or None."""
        if configuration.capabilities and self.capability not in configuration.capabilities:
            return f"not for cards of compute capability {self.capability}"
        attention = self.attention.get(configuration.same_as or "")
        if attention and configuration.name in attention.lower().replace("flashattention", "fa3"):
            return f"the same as {configuration.same_as}"
        return None

    def _run_configuration(
        self, configuration: Configuration, later: Sequence[Configuration], folder: Path
    ) -> None:
        """Run the parts of a configuration. After a part that ends its process, another process does the next ones."""
        remaining, noise = [part for part in configuration.parts if part != "start"], None
        is_first = True
        while remaining or is_first:
            before = list(remaining)
            if self._left < MIN_START_S:
                self._not_reached(
                    configuration, [*(["start"] if is_first else []), *remaining], "no time left"
                )
                return
            process = self._process(configuration, remaining, noise, folder)
            process.begin()
            if "speed" not in configuration.parts:
                self._prepare(later, folder)
            for line in process.lines(self.ends):
                if line["part"] == "start":
                    self.attention[configuration.name] = line.get("attention", "")
                    if is_first or line["ok"] is not True:
                        self.report.add(configuration.name, line)
                    if line["ok"] is False:
                        process.stop()
                        self._not_reached(configuration, remaining, "the scheduler did not start")
                        return
                    is_first = False
                    continue
                if line["part"] == "ordinary" and "error" in line:
                    noise = fmean(line["error"])
                remaining.remove(line["part"])
                self.report.add(configuration.name, line)
            if remaining == before and not is_first:
                why = "the process ended before it began"
                self.report.add(configuration.name, {"part": remaining.pop(0), "ok": False, "failed": why})

    def _not_reached(self, configuration: Configuration, parts: Sequence[str], why: str) -> None:
        for part in parts:
            self.report.add(configuration.name, {"part": part, "skipped": why, "ok": False})

    def _process(
        self, configuration: Configuration, parts: Sequence[str], noise: float | None, folder: Path
    ) -> Process:
        """The process of a configuration: one that was prepared, or a new one."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            if prepared[0] == configuration.name and noise is None and list(parts) == prepared[1].parts:
                return prepared[1]
            prepared[1].stop()
        progress(f"{configuration.name}: starting", self.report.started)
        environment = self.environment | dict(configuration.environment)
        return Process(configuration.name, self.device, list(parts), noise, environment, folder)

    def _prepare(self, later: Sequence[Configuration], folder: Path) -> None:
        """Let the next process import SGLang already."""
        following = next((c for c in later if self._unneeded(c) is None), None)
        if following is not None and self._left > MIN_START_S:
            parts = [part for part in following.parts if part != "start"]
            self._prepared = (following.name, self._process(following, parts, None, folder))


def obstacle(device: str) -> str | None:
    """What keeps this machine from running anything, or None."""
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        return "sglang is not installed, nor on PYTHONPATH"
    if installed != SUPPORTED_SGLANG:
        return f"sglang {installed} is installed, expected {SUPPORTED_SGLANG}"
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "torch finds no GPU (--device cpu needs none)"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the configurations, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--seconds", type=float, default=330.0, help="when to end (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", help="these configurations")
    add("--json", action="store_true", help="one JSON object at the end instead of a line for each part")
    add("--list", action="store_true", help="print the configurations and their parts, and run nothing")
    options = parser.parse_args(argv)
    known = configurations(options.device)
    if unknown := sorted(set(options.only or ()) - known.keys()):
        parser.error(f"--only {unknown[0]!r}, expected one of {', '.join(known)}")
    chosen = [c for c in known.values() if not options.only or c.name in options.only]
    if options.list:
        for configuration in chosen:
            print(json.dumps({"configuration": configuration.name, "parts": configuration.parts}))
        return 0
    report = Report(show=lambda line: None if options.json else print(json.dumps(line), flush=True))
    if why := obstacle(options.device):
        verdict: Line = {"verdict": "could not run", "ok": False, "device": options.device, "why": why}
    else:
        with tempfile.TemporaryDirectory(prefix="sgl-apr-acceptance-") as folder:
            Acceptance(chosen, options.device, options.seconds, report, _capability(options.device)).run(
                Path(folder)
            )
        verdict = report.verdict(options.device)
    print(json.dumps(_as_object(report.lines, verdict) if options.json else verdict), flush=True)
    return 2 if verdict["verdict"] == "could not run" else int(not verdict["ok"])


def _capability(device: str) -> int | None:
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.get_device_capability()[0])


def _as_object(lines: Sequence[Line], verdict: Mapping[str, Any]) -> Line:
    missed = [f"{kind}: {name}" for kind in ("failed", "not_reached") for name in verdict.get(kind, ())]
    return {**verdict, "rows": list(lines), "missed": missed}


if __name__ == "__main__":
    sys.exit(main())
