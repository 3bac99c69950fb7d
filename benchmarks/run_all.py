"""Run the benchmarks one after another, and collect their results in one JSON file and one Markdown page.

python -m benchmarks.run_all [-o DIR] [--only training.tree_build kv_join.soak] [--again] [--list]

Run it from the repository root. A benchmark is any other program in `benchmarks`; its name is its dotted path
below `benchmarks`, as in `kv_join.latency`. Each runs as a command of its own with `--json`, and its stderr goes to
DIR/NAME.log. When one fails, its name is printed and the others still run. A second run continues: it skips what has
succeeded for the current state of the repository. `python -m benchmarks.render_docs DIR/benchmarks.json` writes
docs/benchmarks.md from the results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.common.machine import hardware, versions
from benchmarks.common.markdown import table

HERE = Path(__file__).resolve().parent
PACKAGES = ("sgl-apr", "sglang", "torch", "transformers", "llguidance", "lark", "xgrammar")
RUNS = "runs/eval/"
# Arguments by benchmark: `--check` where it compares itself with bars, and the models that have to be trained first
# (docs/countdown.md).
ARGUMENTS = dict.fromkeys(("kernels.attention", "kv_join.groups", "kv_join.latency", "quality.honesty", "quality.speculative_search", "quality.width_under_load", "training.step_speed", "training.tree_build"), ("--check",)) | {
    "quality.countdown": (
        f"{RUNS}sequential", f"{RUNS}parallel", f"{RUNS}rl", "--sampled", f"{RUNS}parallel-sampled", f"{RUNS}rl-sampled",
        "--check",
    ),
    "quality.stated_width": ("--dialects", "multiverse,spawn", "--check"),
    "quality.early_votes": ("--ways", "beta", "--at-once", "32", "--check"),
    "quality.long_context": ("-o", "runs/long-context"),
    "quality.schools": ("-o", "docs/schools.png"),
    "quality.method_curves": (
        "--limit", "16", "--timed-limit", "6", "--sweep", "tokens=256,512,1024,2048,4096,8192",
        "--sweep", "seconds=2,4,8", "-o", "docs/method-curves.svg", "--check",
    ),
    "agents": ("--check",),
    "gpu_acceptance": ("--device", "cpu"),
    "budgets": ("--check", "--at-once", "200", "-o", "runs/budgets"),
    "startup": ("--check", "--demo", "--variants", "default", "none of these"),
    "masks.mask_latency": ("--runs", "200"),
    "runtime.overhead": ("--check", "--pairs", "16"),
    "runtime.eager": ("--check",),
    "runtime.peers": ("--check",),
    "quality.ablations": (
        "--model", "runs/parallel/model", "--twin", "runs/sequential/model", "--rl", "runs/rl/model", "-o",
        "runs/questions",
    ),
}  # fmt: skip
TOOLS = ("run_all.py", "render_docs.py", "gpu_bundle.py")
OUTPUTS = (
    "runs/questions",
    "runs/budgets",
    "runs/long-context",
)  # every other argument below runs/ is an input


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark program and its arguments.

    Attributes:
        name: The dotted path of the program below `package`.
        package: The directory of all benchmarks; they run in its parent.
        arguments: What the program gets before `--json`.
    """

    name: str
    package: Path
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The arguments of the Python interpreter."""
        return ["-m", f"{self.package.name}.{self.name}", *self.arguments, "--json"]

    @property
    def missing_inputs(self) -> list[str]:
        """Arguments that name inputs which do not exist."""
        root = self.package.parent
        inputs = (a for a in self.arguments if a.startswith("runs/") and a not in OUTPUTS)
        return [path for path in inputs if not (root / path).exists()]

    def run(self, log: Path) -> dict[str, Any]:
        """Run the program.

        Returns:
            `seconds`, `ok`, the JSON object that it printed as `found` if there is one, and if it failed the reason as `why`.
        """
        started = time.monotonic()
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *self.command],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=self.package.parent,
            )
            try:
                stdout, _ = process.communicate()
            except BaseException:  # Ctrl-C reaches the program as well, which then stops its server
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
        entry: dict[str, Any] = {
            "seconds": round(time.monotonic() - started, 1),
            "ok": process.returncode == 0,
        }
        try:
            entry["found"] = json.loads(stdout)
        except ValueError:
            entry["ok"] = False
        if not entry["ok"]:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output on stderr"]
            bars = "; ".join(entry.get("found", {}).get("missed", ()))
            entry["why"] = f"missed: {bars}" if bars else f"status {process.returncode}: {last[0]}"
        return entry


def benchmarks(package: Path) -> list[Benchmark]:
    """The programs in a directory and its subfolders, without those that run, render and help benchmarks."""
    candidates = (p for p in sorted(package.glob("**/*.py")) if p.parent != package or p.name not in TOOLS)
    paths = (p for p in candidates if p.parent != package / "common")
    programs = (p for p in paths if "__main__" in p.read_text())
    names = (".".join(p.relative_to(package).with_suffix("").parts) for p in programs)
    return [Benchmark(name, package, ARGUMENTS.get(name, ())) for name in names]


def repository_state(directory: Path) -> str:
    """The commit, with a hash of uncommitted changes; empty outside a repository."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=directory, check=True, capture_output=True).stdout
            for command in (("rev-parse", "--short=12", "HEAD"), ("diff", "HEAD"))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    suffix = f"-changed-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else ""
    return commit.decode().strip() + suffix


def page(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """All results as a Markdown page."""
    parts = [
        "# Benchmarks\n",
        table(
            ["benchmark", "seconds", "commit", "date", "hardware", "result"],
            [summary(n, e) for n, e in entries.items()],
        ),
    ]
    for name, entry in entries.items():
        if "found" in entry:
            parts += [f"\n## {name}\n", f"`python {' '.join(entry['command'])}`\n", *tables(entry["found"])]
    package_versions = next(iter(entries.values()), {}).get("versions", {})
    parts.append("\n" + ", ".join(f"{package} {number}" for package, number in package_versions.items()))
    return "\n".join(parts) + "\n"


def summary(name: str, entry: Mapping[str, Any]) -> list[object]:
    """The row of a benchmark in the table of all."""
    machine = entry["hardware"]
    return [
        name,
        entry["seconds"],
        entry["commit"] or "-",
        entry["date"],
        f"{machine['cores']} x {machine['cpu']}",
        "ok" if entry["ok"] else entry["why"],
    ]


def tables(result: Mapping[str, Any]) -> list[str]:
    """The JSON object of a benchmark as tables: one of its scalars, and one for each of its lists and objects."""
    scalars = [[k, v] for k, v in result.items() if not isinstance(v, (dict, list))]
    parts = [table(["", "figure"], scalars), ""] if scalars else []
    for name, value in result.items():
        if name == "hardware" or not value or not isinstance(value, (dict, list)):
            continue
        rows: list[dict[str, Any]] = []
        for key, row in value.items() if isinstance(value, dict) else enumerate(value):
            label = {"": key} if isinstance(value, dict) else {}
            rows.append(label | (row if isinstance(row, dict) else {"figure": row}))
        columns = list(dict.fromkeys(column for row in rows for column in row))
        parts += [f"**{name}**\n", table(columns, [[row.get(c, "") for c in columns] for row in rows]), ""]
    return parts


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new one, never a part of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def main(argv: Sequence[str] | None = None, package: Path = HERE) -> int:
    """Run what has no result yet, and write all results; status 1 if a benchmark failed."""
    known = {b.name: b for b in benchmarks(package)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-o", "--out", type=Path, default=Path("runs/benchmarks"), help="default: %(default)s")
    add("--only", nargs="+", choices=known, default=list(known), metavar="NAME", help=", ".join(known))
    add("--again", action="store_true", help="run benchmarks again that already have a result")
    add("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(argv)
    selected = [known[name] for name in dict.fromkeys(options.only)]
    if options.list:
        print("\n".join(f"python {' '.join(b.command)}" for b in selected))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    path, state = options.out / "benchmarks.json", repository_state(package)
    entries: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    source = {"commit": state, "hardware": hardware(), "versions": versions(*PACKAGES)}
    console, failed = Console(stderr=True), 0
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(selected))
        for benchmark in selected:
            name, old = benchmark.name, entries.get(benchmark.name, {})
            progress.update(bar, description=name)
            if old.get("ok") and state and old["commit"] == state and not options.again:
                progress.print(f"{name}: already measured")
            elif benchmark.missing_inputs:
                missing = ", ".join(benchmark.missing_inputs)
                progress.print(f"[yellow]{name}: skipped, {missing} does not exist")
            else:
                entry = benchmark.run(options.out / f"{name}.log")
                date = datetime.now(UTC).isoformat(timespec="seconds")
                entries[name] = {"command": benchmark.command, "date": date, **source, **entry}
                write_atomically(path, json.dumps(entries, indent=1) + "\n")
                write_atomically(options.out / "benchmarks.md", page(entries))
                failed += not entry["ok"]
                progress.print(
                    f"{name}: {entry['seconds']} s" if entry["ok"] else f"[red]{name}: {escape(entry['why'])}"
                )
            progress.advance(bar)
    print(options.out / "benchmarks.md")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
