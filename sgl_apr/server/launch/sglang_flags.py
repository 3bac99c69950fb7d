"""Reads the names of SGLang's flags from its source, because importing SGLang takes many seconds."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from sgl_apr.server.launch.usage import UsageError

FIELDS_FOLDER = "srt/arg_groups/fields"
PARSER_FILE = "srt/server_args.py"
PLUGIN_GROUP = "sglang.srt.plugins"
FLAG = re.compile(r"[\"'](--[a-z][a-z0-9-]*)[\"']")
# Less than all, more than what a change of the source's layout would leave: then nothing is checked here.
MIN_FLAGS = 100


def sglang_flags() -> frozenset[str]:
    """Return the names of SGLang's flags, with `--`. Empty if its source is not as expected."""
    spec = find_spec("sglang")  # imports nothing: it is a top-level package
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    root = Path(spec.submodule_search_locations[0])
    flags = set[str]()
    try:
        for path in (root / FIELDS_FOLDER).glob("*.py"):
            flags |= set(_declared_flags(ast.parse(path.read_text(encoding="utf-8"))))
        flags |= set(_added_flags(ast.parse((root / PARSER_FILE).read_text(encoding="utf-8"))))
    except (OSError, ValueError, SyntaxError):
        return frozenset()
    return frozenset(flags) if len(flags) >= MIN_FLAGS else frozenset()


def plugin_flags() -> frozenset[str]:
    """Return what may be a flag that another plugin of SGLang adds: every string of its source that looks like one."""
    flags = set[str]()
    for package in {entry.module.partition(".")[0] for entry in entry_points(group=PLUGIN_GROUP)} - {
        "sgl_apr"
    }:
        spec = find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        files = [path for folder in folders or () for path in Path(folder).rglob("*.py")]
        if spec and spec.origin and not folders:
            files = [Path(spec.origin)]
        for path in files:
            with contextlib.suppress(OSError):
                flags.update(FLAG.findall(path.read_text(encoding="utf-8", errors="replace")))
    return frozenset(flags)


def check_flags(argv: Sequence[str], own_flags: Sequence[str]) -> None:
    """Check that all flags exist. SGLang takes abbreviations, so these pass, and SGLang checks the values.

    Args:
        argv: The flags of SGLang, with their values.
        own_flags: Flags of this package.

    Raises:
        UsageError: There is an unknown flag.
    """
    if not (flags := sglang_flags()):
        return  # SGLang checks them when it starts
    flags |= plugin_flags() | frozenset(own_flags)
    for argument in argv:
        name = argument.partition("=")[0]
        is_flag = name.startswith("--") and name != "--" and " " not in name
        if is_flag and not any(flag.startswith(name) for flag in flags):
            close = get_close_matches(name[:80], flags, 1, 0.6)
            hint = f"did you mean {close[0]}?" if close else "sgl-apr serve --help says where all are listed"
            raise UsageError(f"no flag {name[:80]}: {hint}")


def _declared_flags(module: ast.Module) -> Iterator[str]:
    """Yield the flags of the annotated fields of a module: `name: A[type, "help"]` or `name: A[type, Arg(...)]`."""
    for node in ast.walk(module):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        annotation = node.annotation
        if not (isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") == "A"):
            continue
        calls = [call for call in ast.walk(annotation.slice) if isinstance(call, ast.Call)]
        options = {
            keyword.arg: keyword.value
            for call in calls
            if getattr(call.func, "id", "") == "Arg"
            for keyword in call.keywords
        }
        if "no_cli" in options:
            continue
        strings = [*_strings(options.get("cli_name")), *_strings(options.get("aliases"))]
        if "cli_name" not in options:
            strings.append("--" + node.target.id.replace("_", "-"))
        yield from strings
        if "BooleanOptionalAction" in ast.dump(options.get("action", ast.Constant(None))):
            yield from (f"--no-{flag.removeprefix('--')}" for flag in strings)


def _added_flags(module: ast.Module) -> Iterator[str]:
    """Yield the flags of the calls of `add_argument` in a module."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            for argument in node.args:
                yield from _strings(argument)


def _strings(node: ast.expr | None) -> list[str]:
    if node is None:
        return []
    return [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
