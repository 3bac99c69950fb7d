"""`sgl-apr doctor` and `sgl-apr doctor join`: which server they look at, and how what they find is shown."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgl_apr.errors import AprError, LaunchError, UnsupportedEngine

STATES = {"ok": "[green]ok", "missing": "[yellow]missing (optional)", "failed": "[red]failed"}


def add_commands(commands: Any) -> None:
    """Add `doctor` to an argparse parser."""
    doctor = commands.add_parser(
        "doctor",
        help="check the installation, a server, and how a model bears KV joins; status 1 if something fails",
        epilog="examples:\n  sgl-apr doctor\n  sgl-apr doctor --url http://127.0.0.1:30000\n"
        "  sgl-apr doctor join --model $(sgl-apr model smollm2)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _where(doctor)
    doctor.set_defaults(command=_doctor)
    join = doctor.add_subparsers(metavar="[join]").add_parser(
        "join",
        help="what KV joins do to a model's next tokens, beside text joins",
        epilog="example: sgl-apr doctor join --url http://127.0.0.1:30000 --prompts questions.txt",
    )
    _where(join)
    join.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='lines of JSON with "prefix", "branches" and "header", or questions, for which the model writes '
        "the branches (default: five samples of our own)",
    )
    join.set_defaults(command=_join)


def _where(parser: argparse.ArgumentParser) -> None:
    # No defaults: those of the inner parser would overwrite what the outer one has read.
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--url", default=argparse.SUPPRESS, help="a running server")
    which.add_argument(
        "--model", default=argparse.SUPPRESS, help="a directory or hub id, served for the time being"
    )
    parser.add_argument("--api-key", default=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


@contextlib.contextmanager
def _server(options: argparse.Namespace) -> Iterator[str | None]:
    """The URL of the server that was asked for, None if none was."""
    from sgl_apr.server.launch.launcher import Server

    if model := getattr(options, "model", None):
        key = getattr(options, "api_key", None)
        with Server(model, api_key=key) as server:
            yield server.url
    else:
        yield getattr(options, "url", None)


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sgl_apr.server.doctor import Finding, is_healthy, check_installation, check_server

    findings = list(check_installation())
    try:
        with _server(options) as url:
            if url:
                findings += check_server(url, getattr(options, "api_key", None))
    except LaunchError as error:
        findings.append(Finding("server", "failed", str(error), "the log says more"))
    if getattr(options, "json", False):
        print(json.dumps({"ok": is_healthy(findings), "findings": [asdict(f) for f in findings]}))
    else:
        table = Table("", "", "found")
        for f in findings:
            hint = f"\n{f.hint}" if f.hint else ""
            table.add_row(f.name, STATES[f.state], Text.assemble(f.found, (hint, "dim")))
        Console().print(table)
    return int(not is_healthy(findings))


def _join(options: argparse.Namespace) -> int:
    from sgl_apr.engine.http import HttpEngine
    from sgl_apr.server.kv_join import drift, drift_samples
    from sgl_apr.server.kv_join.probe import make_client

    path: Path | None = options.prompts
    given = drift_samples.read_samples(path) if path else drift_samples.BUILTIN_SAMPLES
    key = getattr(options, "api_key", None)

    async def connected(url: str) -> HttpEngine:
        async with await HttpEngine.connect(url, api_key=key) as engine:
            return engine

    with _server(options) as url:
        if url is None:
            raise AprError("no server: give --url URL, or --model MODEL")
        engine = asyncio.run(connected(url))
        if not engine.joins_kv:
            raise UnsupportedEngine(f"{url} does not join in its cache: serve with --radix-cache-backend apr")
        ask = make_client(url, key)
        found = []
        for one in given:
            sample = drift.sample_from_model(ask, engine.tokenizer, one) if isinstance(one, str) else one
            found.append(drift.measure_drift(ask, engine.tokenizer, sample))
    every = drift.pool_measurements(found)
    said = drift.judge_drift(every.kv, every.reversed)
    if getattr(options, "json", False):
        print(json.dumps({"verdict": said, "samples": [asdict(m) for m in found], "overall": asdict(every)}))
    else:
        _show([*found, every], f"This model {said} KV joins.")
    return 0


def _show(measured: list[Any], said: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("sample", overflow="ellipsis", no_wrap=True, max_width=28)
    for head in ("tokens", "KV KL", "same", "text KL", "same"):
        table.add_column(head, justify="right", no_wrap=True)
    for m in measured:
        shifts = [x for s in (m.kv, m.reversed) for x in (f"{s.kl:.3f}", f"{s.agreement:.0%}")]
        table.add_row(Text(m.name), str(m.steps), *shifts, end_section=m is measured[-2])
    console = Console()
    console.print(table)
    console.print(
        "Next tokens behind a KV join, and behind text with the branches reversed, beside those behind text: "
        "divergence in nats, and how often the likeliest is the same."
    )
    console.print(said)
