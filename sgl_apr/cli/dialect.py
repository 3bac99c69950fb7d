"""`sgl-apr dialect`: list the dialects, show one, or check a grammar file of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_apr.errors import GrammarError
from sgl_apr.views.printable import printable, printable_json

if TYPE_CHECKING:
    from sgl_apr.formats.dialect_check import DialectReport
    from sgl_apr.formats.dialects import Dialect

OPTION_NAMES = (
    "max_width", "max_depth", "width", "min_width", "first_number", "branch_context", "branch_prompt", "joins",
    "published_join", "policy",
)  # fmt: skip


def add_command(commands: Any) -> None:
    """Add `dialect` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "dialect",
        help="list the dialects, show one, or check a grammar file",
        epilog="examples:\n"
        "  sgl-apr dialect list\n"
        "  sgl-apr dialect show npr\n"
        "  sgl-apr dialect check debate.lark",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("list", help="print the names of all dialects")
    action.add_argument("--json", action="store_true", help="print their options as JSON")
    action.set_defaults(command=_list)
    action = actions.add_parser("show", help="print the grammar file of a dialect")
    action.add_argument("dialect", metavar="NAME", help="the name of a dialect")
    action.add_argument("--json", action="store_true", help="print its options, rules and tags as JSON")
    action.set_defaults(command=_show)
    action = actions.add_parser(
        "check",
        help="check a grammar file: its rules, tags, masks and an example; status 1 if something will not work",
        epilog="example: sgl-apr dialect check debate.lark --json",
    )
    action.add_argument("file", metavar="FILE", help="a .lark file, or the name of a dialect")
    action.add_argument("--json", action="store_true", help="print the report as JSON")
    action.set_defaults(command=_check)


def _list(options: argparse.Namespace) -> int:
    from sgl_apr.formats.dialects import dialect, dialect_names

    for name in dialect_names():
        known = dialect(name)
        comment = known.source.split("\n", 1)[0].lstrip("/ ")
        print(
            printable_json(json.dumps(_facts(known))) if options.json else printable(f"{name:14} {comment}")
        )
    return 0


def _show(options: argparse.Namespace) -> int:
    from sgl_apr.formats.dialects import dialect

    known = dialect(options.dialect)
    facts = {**_facts(known), "tags": known.tags, "rules": list(known.grammar.rules), "grammar": known.source}
    print(printable_json(json.dumps(facts)) if options.json else printable(known.source.rstrip("\n")))
    return 0


def _facts(dialect: Dialect) -> dict[str, Any]:
    return {"name": dialect.name, **{name: getattr(dialect, name) for name in OPTION_NAMES}}


def _check(options: argparse.Namespace) -> int:
    from sgl_apr.cli.arguments import load_dialect
    from sgl_apr.formats.dialect_check import check_dialect

    try:
        report = check_dialect(load_dialect(options.file))
    except GrammarError as error:
        if not options.json:
            raise
        print(printable_json(json.dumps({"valid": False, "errors": [str(error)]})))
        return 1
    if options.json:
        print(printable_json(json.dumps(_report_json(report))))
    else:
        _print_report(report, options.file)
    return int(bool(report.errors))


def _report_json(report: DialectReport) -> dict[str, Any]:
    grammar = report.dialect.grammar
    return {
        "valid": not report.errors,
        "errors": report.errors,
        "warnings": report.warnings,
        **_facts(report.dialect),
        "tags": report.dialect.tags,
        "rules": {name: grammar.lines[name] for name in grammar.rules},
        "backends": report.backends,
        "example": report.example,
    }


def _print_report(report: DialectReport, file: str) -> None:
    dialect = report.dialect
    tags = grammar_tags(dialect)
    state = f"{len(report.errors)} errors" if report.errors else "is a dialect"
    lines = [
        f"{Path(file).name}: {state}",
        f"rules    {', '.join(dialect.grammar.rules)}",
        f"tags     {' '.join(tags) or 'none'}",
        f"width    {dialect.min_width} to {dialect.max_width} branches, {dialect.width} by default; depth {dialect.max_depth}",
        f"joins    {', '.join(dialect.joins)} (published with {dialect.published_join}); policy {dialect.policy}",
        f"masks    {'; '.join(report.backends) or 'none'}",
    ]
    lines += ["example", *(f"  {line}" for line in report.example.split("\n"))] if report.example else []
    print(printable("\n".join(lines)))
    for kind, messages in (("error", report.errors), ("warning", report.warnings)):
        for message in messages:
            print(printable(f"{kind}: {message}"), file=sys.stderr)


def grammar_tags(dialect: Dialect) -> list[str]:
    """Return the tags of a dialect for a reader: of numbered tags only those of the first branch."""
    return [tag.replace("\n", "\\n") for tag in dialect.grammar.tags([str(dialect.first_number)])]
