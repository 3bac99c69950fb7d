"""`sgl-apr completion`: print a script that completes commands, flags and files in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")
FILE_ARGUMENTS = ("file", "files", "inputs", "model", "tokenizer", "tasks", "compare")


def add_command(commands: Any) -> None:
    """Add `completion` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and flags in a shell",
        epilog="examples, which take effect in a new shell:\n"
        "  sgl-apr completion bash > ~/.local/share/bash-completion/completions/sgl-apr\n"
        '  sgl-apr completion zsh > "${fpath[1]}/_sgl-apr"\n'
        "  sgl-apr completion fish > ~/.config/fish/completions/sgl-apr.fish",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(command=_completion)


def _completion(options: argparse.Namespace) -> int:
    import shtab

    from sgl_apr.cli.main import build_parser
    from sgl_apr.server.launch.help import own_flags
    from sgl_apr.server.launch.sglang_flags import sglang_flags

    parser = build_parser()
    parsers = dict(_parsers(parser))
    for flag in sorted({*sglang_flags(), *own_flags()}):
        parsers["serve"].add_argument(flag)
    for subparser in parsers.values():
        for action in subparser._actions:
            if action.type is Path or action.dest in FILE_ARGUMENTS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # read by shtab
    print(shtab.complete(parser, options.shell))
    return 0


def _parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the parsers of all subcommands, with their names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                yield name, subparser
                yield from _parsers(subparser)
