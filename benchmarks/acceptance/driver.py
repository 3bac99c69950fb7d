"""Runs the configurations one after the other, each in its own process, and sums their parts up."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.acceptance.configurations import Configuration, tree_core_environment
from benchmarks.acceptance.process import Process

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


class AcceptanceRun:
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
        self.backends: dict[str, set[str]] = {}  # of attention, of the configurations that have started
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
                if self._prepared and self._prepared[0] == configuration.name:
                    self._drop_prepared()
        finally:
            self._drop_prepared()

    def _drop_prepared(self) -> None:
        if self._prepared:
            self._prepared[1].stop()
            self._prepared = None

    @property
    def _left(self) -> float:
        return self.ends - time.monotonic()

    def _unneeded(self, configuration: Configuration) -> str | None:
        """Why a configuration says nothing on this machine, or None."""
        if configuration.capabilities and self.capability not in configuration.capabilities:
            return f"not for cards of compute capability {self.capability}"
        if self.backends.get(configuration.same_as or "") == {configuration.flags.get("attention_backend")}:
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
                parts = [*(["start"] if is_first else []), *remaining]
                self._skip(configuration, parts, "no time left", ok=False)
                return
            process = self._process(configuration, remaining, noise, folder)
            process.begin()
            if "speed" not in configuration.parts:
                self._prepare(later, folder)
            for line in process.lines(self.ends):
                if line["part"] == "start":
                    self.backends[configuration.name] = set(line.get("attention_backends", ()))
                    if is_first or line["ok"] is not True:
                        self.report.add(configuration.name, line)
                    if line["ok"] is not True:
                        process.stop()
                        self._skip(configuration, remaining, "the scheduler did not start", ok=line["ok"])
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

    def _skip(self, configuration: Configuration, parts: Sequence[str], why: str, ok: bool | None) -> None:
        for part in parts:
            self.report.add(configuration.name, {"part": part, "skipped": why, "ok": ok})

    def _process(
        self, configuration: Configuration, parts: Sequence[str], noise: float | None, folder: Path
    ) -> Process:
        """The process of a configuration: the one that was prepared for it, or a new one."""
        if self._prepared and self._prepared[0] == configuration.name:
            (_, process), self._prepared = self._prepared, None
            return process
        progress(f"{configuration.name}: starting", self.report.started)
        environment = self.environment | dict(configuration.environment)
        return Process(configuration.name, self.device, list(parts), noise, environment, folder)

    def _prepare(self, later: Sequence[Configuration], folder: Path) -> None:
        """Let the process of the next configuration import SGLang already."""
        following = next((c for c in later if self._unneeded(c) is None), None)
        if following is not None and self._prepared is None and self._left > MIN_START_S:
            parts = [part for part in following.parts if part != "start"]
            self._prepared = (following.name, self._process(following, parts, None, folder))
