"""Every benchmark of this directory, one after another, into one JSON file and one page of Markdown.

python benchmarks/run_all.py [-o DIR] [--only trie grammar] [--again] [--list]

Each runs as a command of its own with --json; what it says meanwhile is in DIR/NAME.log. One that fails is named, and the
others run. Run again, it goes on: what is there already for this state of the repository is not measured again.
`python benchmarks/render_docs.py DIR/benchmarks.json` writes what was found into README and docs.
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
# Some judge themselves if they are asked to, and some compare models that have to be trained first (docs/countdown.md).
ARGUMENTS = dict.fromkeys(("attention", "join", "trie"), ("--check",)) | {
    "countdown": (
        f"{RUNS}sequential", f"{RUNS}parallel", f"{RUNS}rl", "--sampled", f"{RUNS}parallel-sampled", f"{RUNS}rl-sampled",
        "--check",
    ),
    "grammar": ("--runs", "200"),
    "runtime": ("--check", "--pairs", "40"),
    "questions": (
        "--model", "runs/parallel/model", "--twin", "runs/sequential/model", "--rl", "runs/rl/model", "-o",
        "runs/questions",
    ),
}  # fmt: skip
NONE = ("all.py", "figures.py")  # programs, but no benchmarks
MADE = ("runs/questions",)  # all else in runs/ has to be there


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A script and what it is asked."""

    script: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.script.stem

    @property
    def command(self) -> list[str]:
        return [f"{self.script.parent.name}/{self.script.name}", *self.arguments, "--json"]

    @property
    def root(self) -> Path:
        """Where it runs."""
        return self.script.parent.parent

    @property
    def missing(self) -> list[str]:
        """What it reads and is not there."""
        return [
            a
            for a in self.arguments
            if a.startswith("runs/") and a not in MADE and not (self.root / a).exists()
        ]

    def measured(self, log: Path) -> dict[str, Any]:
        """Run it: whether it went well, what it found, and why not."""
        began = time.monotonic()
        with log.open("w") as said:
            process = subprocess.Popen(
                [sys.executable, *self.command], stdout=subprocess.PIPE, stderr=said, text=True, cwd=self.root
            )
            try:
                printed, _ = process.communicate()
            except BaseException:  # Ctrl-C is its own as well: it stops its server
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
        found: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "ok": process.returncode == 0}
        try:
            found["found"] = json.loads(printed)
        except ValueError:
            found["ok"] = False
        if not found["ok"]:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            bars = "; ".join(found.get("found", {}).get("missed", ()))
            found["why"] = f"missed: {bars}" if bars else f"status {process.returncode}: {last[0]}"
        return found


def benchmarks(where: Path) -> list[Benchmark]:
    """The scripts of a directory that are programs, but this one."""
    programs = [p for p in sorted(where.glob("*.py")) if p.name not in NONE and "__main__" in p.read_text()]
    return [Benchmark(p, ARGUMENTS.get(p.stem, ())) for p in programs]


def state(where: Path) -> str:
    """The commit, and what is changed behind it; empty outside a repository."""
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=where, check=True, capture_output=True).stdout
            for command in (("rev-parse", "--short=12", "HEAD"), ("diff", "HEAD"))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    mark = f"-changed-{hashlib.sha256(changed).hexdigest()[:8]}" if changed else ""
    return commit.decode().strip() + mark


def page(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """What was found, for people."""
    parts = [
        "# Benchmarks\n",
        table(
            ["benchmark", "seconds", "commit", "date", "hardware", "came to"],
            [summary(n, e) for n, e in kept.items()],
        ),
    ]
    for name, entry in kept.items():
        if "found" in entry:
            parts += [f"\n## {name}\n", f"`python {' '.join(entry['command'])}`\n", *shown(entry["found"])]
    versions_of = next(iter(kept.values()), {}).get("versions", {})
    parts.append("\n" + ", ".join(f"{package} {number}" for package, number in versions_of.items()))
    return "\n".join(parts) + "\n"


def summary(name: str, entry: Mapping[str, Any]) -> list[object]:
    machine = entry["hardware"]
    came = "well" if entry["ok"] else entry["why"]
    return [
        name,
        entry["seconds"],
        entry["commit"] or "-",
        entry["date"],
        f"{machine['cores']} x {machine['cpu']}",
        came,
    ]


def shown(found: Mapping[str, Any]) -> list[str]:
    """Tables of what a benchmark printed: one of its single figures, one of each of its lists and groups."""
    single = [[k, v] for k, v in found.items() if not isinstance(v, (dict, list))]
    parts = [table(["", "figure"], single), ""] if single else []
    for name, value in found.items():
        if name == "hardware" or not value or not isinstance(value, (dict, list)):
            continue
        rows: list[dict[str, Any]] = []
        for key, row in value.items() if isinstance(value, dict) else enumerate(value):
            named = {"": key} if isinstance(value, dict) else {}
            rows.append(named | (row if isinstance(row, dict) else {"figure": row}))
        columns = list(dict.fromkeys(column for row in rows for column in row))
        parts += [f"**{name}**\n", table(columns, [[row.get(c, "") for c in columns] for row in rows]), ""]
    return parts


def write(path: Path, text: str) -> None:
    """As a whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def main(argv: Sequence[str] | None = None, where: Path = HERE) -> int:
    """Run what is left, and write what there is; status 1 if something failed."""
    known = {b.name: b for b in benchmarks(where)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-o", "--out", type=Path, default=Path("runs/benchmarks"), help="default: %(default)s")
    add("--only", nargs="+", choices=known, default=list(known), metavar="NAME", help=", ".join(known))
    add("--again", action="store_true", help="measure what is there already as well")
    add("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(argv)
    asked = [known[name] for name in dict.fromkeys(options.only)]
    if options.list:
        print("\n".join(f"python {' '.join(b.command)}" for b in asked))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    kept_at, now = options.out / "benchmarks.json", state(where)
    kept: dict[str, Any] = json.loads(kept_at.read_text()) if kept_at.exists() else {}
    about = {"commit": now, "hardware": hardware(), "versions": versions(*PACKAGES)}
    console, failed = Console(stderr=True), 0
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(asked))
        for benchmark in asked:
            name, old = benchmark.name, kept.get(benchmark.name, {})
            progress.update(bar, description=name)
            if old.get("ok") and now and old["commit"] == now and not options.again:
                progress.print(f"{name}: there already")
            elif benchmark.missing:
                progress.print(f"[yellow]{name}: not run, there is no {', '.join(benchmark.missing)}")
            else:
                found = benchmark.measured(options.out / f"{name}.log")
                date = datetime.now(UTC).isoformat(timespec="seconds")
                kept[name] = {"command": benchmark.command, "date": date, **about, **found}
                write(kept_at, json.dumps(kept, indent=1) + "\n")
                write(options.out / "benchmarks.md", page(kept))
                failed += not found["ok"]
                progress.print(
                    f"{name}: {found['seconds']} s" if found["ok"] else f"[red]{name}: {escape(found['why'])}"
                )
            progress.advance(bar)
    print(options.out / "benchmarks.md")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
