"""`sgl-apr doctor`: checks an installation and a server, also for security faults, and measures the drift of KV joins."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sgl_apr.cli.arguments import parse_seconds
from sgl_apr.errors import AprError, LaunchError, UnsupportedEngine

API_KEY_ENV = "SGL_APR_API_KEY"
SECURITY_STATES = {"pass": "green", "FAIL": "red", "not probed": "yellow"}
STATES = {"ok": "[green]ok", "missing": "[yellow]missing (optional)", "failed": "[red]failed"}


def add_command(commands: Any) -> None:
    """Add `doctor` and `doctor join` to the subcommands of an argparse parser."""
    doctor = commands.add_parser(
        "doctor",
        help="check the installation, a server, and the drift of KV joins; status 1 if something fails",
        epilog="examples:\n  sgl-apr doctor\n  sgl-apr doctor --url http://127.0.0.1:30000\n"
        "  sgl-apr doctor --security --url http://127.0.0.1:30000\n"
        "  sgl-apr doctor join --model $(sgl-apr model smollm2)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server_arguments(doctor)
    doctor.add_argument(
        "--security",
        action="store_true",
        help="check the server at --url, any SGLang server, for security faults, without harm to it",
    )
    doctor.add_argument(
        "--body-wait",
        type=parse_seconds,
        metavar="S",
        help="with --security: seconds to wait until a half-sent body is refused (default: 65; 0 leaves it out)",
    )
    doctor.set_defaults(command=_doctor)
    join = doctor.add_subparsers(metavar="[join]").add_parser(
        "join",
        help="compare a model's next tokens after KV joins with those after text joins",
        epilog="example: sgl-apr doctor join --url http://127.0.0.1:30000 --prompts questions.txt",
    )
    _add_server_arguments(join)
    join.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='lines of JSON with "prefix", "branches" and "header", or questions, for which the model writes '
        "the branches (default: five built-in samples)",
    )
    join.set_defaults(command=_join)


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    # No defaults: those of the inner parser would overwrite what the outer one has parsed.
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", default=argparse.SUPPRESS, help="a running server")
    server.add_argument("--model", default=argparse.SUPPRESS, help="a directory or hub id to serve meanwhile")
    parser.add_argument(
        "--api-key", default=argparse.SUPPRESS, help=f"key of the server (default: ${API_KEY_ENV})"
    )
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


@contextlib.contextmanager
def _server(options: argparse.Namespace) -> Iterator[str | None]:
    """The URL of the server that the options name, launched if needed; None if they name none."""
    from sgl_apr.server.launch.launcher import Server

    if model := getattr(options, "model", None):
        with Server(model, api_key=_api_key(options)) as server:
            yield server.url
    else:
        yield getattr(options, "url", None)


def _api_key(options: argparse.Namespace) -> str | None:
    return getattr(options, "api_key", None) or os.environ.get(API_KEY_ENV) or None


def _security(options: argparse.Namespace) -> int:
    from rich.text import Text

    from sgl_apr.server.security.checks import BODY_WAIT_S, SecurityCheck, is_secure

    url = getattr(options, "url", None)
    if url is None:
        raise AprError("no server: --security checks the running server that --url names")
    wait = BODY_WAIT_S if options.body_wait is None else options.body_wait
    findings = list(SecurityCheck(url, _api_key(options), wait).run())
    if getattr(options, "json", False):
        print(json.dumps({"ok": is_secure(findings), "findings": [asdict(f) for f in findings]}))
    else:
        _print_findings(findings, {state: Text(state, style) for state, style in SECURITY_STATES.items()})
    return int(not is_secure(findings))


def _print_findings(findings: Sequence[Any], states: Mapping[str, Any]) -> None:
    """Print findings as a table. Servers wrote parts of them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sgl_apr.views.printable import printable

    table = Table("", "", "found")
    for f in findings:
        hint = f"\n{printable(f.hint)}" if f.hint else ""
        table.add_row(f.name, states[f.state], Text.assemble(printable(f.found), (hint, "dim")))
    Console().print(table)


def _doctor(options: argparse.Namespace) -> int:
    if options.security:
        return _security(options)
    from sgl_apr.server.doctor import Finding, check_installation, check_server, is_healthy

    findings = list(check_installation())
    try:
        with _server(options) as url:
            if url:
                findings += check_server(url, _api_key(options))
    except LaunchError as error:
        findings.append(Finding("server", "failed", str(error), "see its log"))
    if getattr(options, "json", False):
        print(json.dumps({"ok": is_healthy(findings), "findings": [asdict(f) for f in findings]}))
    else:
        _print_findings(findings, STATES)
    return int(not is_healthy(findings))


def _join(options: argparse.Namespace) -> int:
    from sgl_apr.engine.http import HttpEngine
    from sgl_apr.server.kv_join import drift, drift_samples
    from sgl_apr.server.kv_join.probe import make_client

    path: Path | None = options.prompts
    samples = drift_samples.read_samples(path) if path else drift_samples.BUILTIN_SAMPLES
    key = _api_key(options)

    async def connect(url: str) -> HttpEngine:
        async with await HttpEngine.connect(url, api_key=key) as engine:
            return engine

    with _server(options) as url:
        if url is None:
            raise AprError("no server: give --url URL, or --model MODEL")
        engine = asyncio.run(connect(url))
        if not engine.joins_kv:
            raise UnsupportedEngine(f"{url} does not join in its cache: serve with --radix-cache-backend apr")
        client, tokenizer = make_client(url, key), engine.tokenizer
        measured = []
        for item in samples:
            sample = drift.sample_from_model(client, tokenizer, item) if isinstance(item, str) else item
            measured.append(drift.measure_drift(client, tokenizer, sample))
    overall = drift.pool_measurements(measured)
    verdict = drift.judge_drift(overall.kv, overall.reversed)
    if getattr(options, "json", False):
        samples_json = [asdict(m) for m in measured]
        print(json.dumps({"verdict": verdict, "samples": samples_json, "overall": asdict(overall)}))
    else:
        _print_drift([*measured, overall], f"This model {verdict} KV joins.")
    return 0


def _print_drift(measured: list[Any], verdict: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sgl_apr.views.printable import printable

    table = Table()
    table.add_column("sample", overflow="ellipsis", no_wrap=True, max_width=28)
    for head in ("tokens", "KV KL", "KV same", "text KL", "text same"):
        table.add_column(head, justify="right", no_wrap=True)
    for m in measured:
        shifts = [x for s in (m.kv, m.reversed) for x in (f"{s.kl:.3f}", f"{s.agreement:.0%}")]
        table.add_row(Text(printable(m.name)), str(m.steps), *shifts, end_section=m is measured[-2])
    console = Console()
    console.print(table)
    console.print(
        "Next tokens after a KV join, and after text with the branches reversed, compared with those after text: "
        "divergence in nats, and how often the most likely token is the same."
    )
    console.print(verdict)
