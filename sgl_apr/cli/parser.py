"""The argument parser of all subcommands: an error is at most two lines of usage and one that says what was expected."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from sgl_apr.runtime.value_checks import unknown_name


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors show the usage of the subcommand that was called, and what a wrong name may mean."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments. What is left over is an error of this parser, not of the one that contains it."""
        parsed, others = super().parse_known_args(args, namespace)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return parsed, others

    def error(self, message: str) -> NoReturn:
        """Print a short usage and the message, and exit with status 2."""
        formatter = self._get_formatter()
        needed = [action for action in self._actions if action.required or not action.option_strings]
        formatter.add_usage(None, needed, [])
        usage = " ".join(formatter.format_help().split())
        print(usage.replace(self.prog, f"{self.prog} [OPTIONS]", 1), file=sys.stderr)
        print(f"try `{self.prog} --help`", file=sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown_name(value, map(str, action.choices), "choice "))
