"""The `sgl-apr` command: arguments in, library calls, text or JSON out. Logs and errors go to stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from sgl_apr import __version__
from sgl_apr.cli.missing_packages import explain_missing
from sgl_apr.cli.parser import CommandParser
from sgl_apr.errors import AprError

SUBCOMMANDS = (
    "model",
    "run",
    "fork",
    "parse",
    "validate",
    "convert",
    "doctor",
    "train",
    "eval",
    "plot",
    "report",
    "dialect",
    "completion",
)
INTERRUPTED = 130  # the status after Ctrl-C, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 for success, 1 for an error, 130 for Ctrl-C. Wrong usage exits with 2.
    """
    if argv is None:
        argv = sys.argv[1:]
        _hide_keys(argv)
    try:
        status = _run(list(argv))
        sys.stdout.flush()  # a disk may be full, which is an error of this command
        return status
    except AprError as error:
        _print_error(error)
        return 1
    except ModuleNotFoundError as error:
        if (message := explain_missing(error)) is None:
            raise
        _print_error(message)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has exited
        # Python flushes stdout at its exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, or a file that is gone
        name = f"{error.filename}: " if error.filename else ""
        _print_error(f"{name}{error.strerror or error}")
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    if argv[:1] == ["serve"]:  # SGLang parses everything after it
        from sgl_apr.server.launch.launcher import serve
        from sgl_apr.training.models.builtin import locate_models

        return serve(locate_models(argv[1:]))
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 0
    options = parser.parse_args(argv)
    return int(options.command(options))


def _hide_keys(argv: Sequence[str]) -> None:
    """Overwrite keys on the command line of this process, which other users of the machine can read."""
    if any(argument.startswith(("--ap", "--ad", "--ssl-keyfile-")) for argument in argv):
        from sgl_apr.server.launch.secret_options import hide_secrets_of_command_line

        hide_secrets_of_command_line()


def _print_error(message: object) -> None:
    from sgl_apr.cli.display import print_error

    print_error(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands but `serve`."""
    parser = CommandParser(
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
    from sgl_apr.engine.sglang_names import SUPPORTED_SGLANG

    parser.add_argument(
        "--version", action="version", version=f"sgl-apr {__version__}, sglang {SUPPORTED_SGLANG}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("serve", help="launch a patched SGLang server (takes every SGLang server flag)")
    for name in SUBCOMMANDS:
        import_module(f"sgl_apr.cli.{name}").add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
