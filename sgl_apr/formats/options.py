"""The options of a dialect: what its grammar rules cannot express, declared in the grammar file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from sgl_apr.errors import GrammarError
from sgl_apr.formats.branch_prompts import branch_prompt_names, has_branch_prompt

Phase = Literal["trunk", "after", "branch", "rejoin"]
BranchContext = Literal["prefix", "message"]
JoinMethod = Literal["text", "kv", "message"]
JOIN_POLICY_PATTERN = re.compile(
    r"all|first|quorum:[1-9][0-9]{0,8}|deadline:(?:[0-9]{0,9}[.])?[0-9]{1,20}", re.ASCII
)
MAX_DIGITS = 9  # of a number in a grammar file
MAX_WIDTH, MAX_DEPTH, MAX_FIRST_NUMBER = 4096, 16, 1_000_000
_KINDS: Mapping[type, str] = {int: "a whole number", str: "a string", tuple: "a tuple of strings"}


class BranchNumbering(NamedTuple):
    """The numbers that a phase can write.

    Attributes:
        prefix: The prefix of the numbers of a fork (`3.` in branch 3).
        number: The number of the branch itself, or of the next branch in a dialect that forks one at a time.
        waiting: The numbers of the branches that the phase can wait for.
    """

    prefix: str = ""
    number: str = ""
    waiting: tuple[str, ...] = ()


NO_NUMBERING = BranchNumbering()


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """Options of a dialect.

    A grammar file declares them in lines of the form `//@ key value, key value`. Keyword arguments of
    `Dialect.from_file` override them.

    Attributes:
        max_width: The highest number of branches that a block of the format can have.
        max_depth: How deep blocks can nest.
        width: Branches of a fork where the budget sets no width. A fork without outlines always gets as many
            branches as its width.
        min_width: The lowest number of branches of a fork.
        first_number: The number of the first branch.
        branch_context: What a branch is conditioned on: "prefix" (all text before the fork) or "message" (only
            its own message).
        branch_prompt: How that message is made: the name of a `sgl_apr.formats.BranchPrompt`.
        joins: The join methods that work with the format, the default first.
        published_join: The join method that the format was published with.
        policy: When branches join: "all", "first", "quorum:k" (k branches have ended) or "deadline:s" (after s
            seconds).
    """

    max_width: int = 50
    max_depth: int = 1
    width: int = 8
    min_width: int = 2
    first_number: int = 1
    branch_context: BranchContext = "prefix"
    branch_prompt: str = "outline"
    joins: tuple[JoinMethod, ...] = ("text",)
    published_join: JoinMethod = "text"
    policy: str = "all"


def resolve_options(
    declared: Mapping[str, tuple[str, int]], overrides: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the options of a dialect as keyword arguments: those of its file, overridden by others, and completed.

    Args:
        declared: Option values as they are written in the file, each with the number of its line.
        overrides: Fields of `FormatOptions`.
        where: The file, for error messages.

    Raises:
        GrammarError: An option is unknown, or its value is not a number where one is expected.
    """
    names = [f.name for f in fields(FormatOptions)]
    if unknown := [name for name in overrides if name not in names]:
        raise GrammarError(f"{where}: no option {unknown[0]!r}, expected one of {', '.join(names)}")
    return complete_options({**parse_options(declared, where), **overrides})


def parse_options(declared: Mapping[str, tuple[str, int]], where: str) -> dict[str, Any]:
    """Convert the declared options of a grammar file to keyword arguments of `FormatOptions`.

    Args:
        declared: Option values as they are written in the file, each with the number of its line.
        where: The file, for error messages.

    Raises:
        GrammarError: An option is unknown, or its value is not a number where one is expected.
    """
    defaults = {f.name: f.default for f in fields(FormatOptions)}
    options: dict[str, Any] = {}
    for key, (value, line) in declared.items():
        place = f"{where}, line {line}"
        if key not in defaults:
            raise GrammarError(f"{place}: no option {key[:40]!r}, expected one of {', '.join(defaults)}")
        if isinstance(defaults[key], int):
            if not (value.isascii() and value.isdecimal() and len(value) <= MAX_DIGITS):
                raise GrammarError(
                    f"{place}: {key} {value[:40]}, expected a number of at most {MAX_DIGITS} digits"
                )
            options[key] = int(value)
        else:
            options[key] = tuple(value.split()) if key == "joins" else value
    return options


def complete_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Add a width and a minimal width that fit the others, where these are not set.

    A format with `max_width 4` has the width 4, because the default of 8 exceeds it.
    """
    completed = dict(options)
    for name, limit in (("width", "max_width"), ("min_width", "width")):
        highest = completed.get(limit)
        default = getattr(FormatOptions, name)
        if name not in completed and isinstance(highest, int):
            completed[name] = min(default, highest)
    return completed


def validate_options(options: FormatOptions, where: str) -> None:
    """Check that options have the right types, are consistent, and that the names in them exist.

    Raises:
        GrammarError: An option is out of range, unknown, or contradicts another.
    """
    for field in fields(FormatOptions):
        value = getattr(options, field.name)
        kind: type = type(field.default)
        if type(value) is not kind or (kind is tuple and not all(type(v) is str for v in options.joins)):
            raise GrammarError(f"{where}: {field.name} {value!r:.60}, expected {_KINDS[kind]}")
    if not 1 <= options.min_width <= options.width <= options.max_width <= MAX_WIDTH:
        raise GrammarError(
            f"{where}: min_width {options.min_width}, width {options.width}, max_width {options.max_width}: "
            f"expected 1 <= min_width <= width <= max_width <= {MAX_WIDTH}"
        )
    if not 1 <= options.max_depth <= MAX_DEPTH:
        raise GrammarError(f"{where}: max_depth {options.max_depth}, expected 1 to {MAX_DEPTH}")
    if not 0 <= options.first_number <= MAX_FIRST_NUMBER:
        raise GrammarError(f"{where}: first_number {options.first_number}, expected 0 to {MAX_FIRST_NUMBER}")
    if options.branch_context not in get_args(BranchContext):
        raise GrammarError(
            f"{where}: branch_context {options.branch_context}, expected {' or '.join(get_args(BranchContext))}"
        )
    if not options.joins or not {*options.joins, options.published_join} <= set(get_args(JoinMethod)):
        raise GrammarError(
            f"{where}: joins {' '.join(options.joins)}, expected some of {', '.join(get_args(JoinMethod))}"
        )
    if ("message" in options.joins) != (options.branch_context == "message"):
        raise GrammarError(f"{where}: expected the join 'message' if and only if branch_context is 'message'")
    if not has_branch_prompt(options.branch_prompt):
        raise GrammarError(
            f"{where}: no branch prompt {options.branch_prompt[:60]!r}, "
            f"expected one of {', '.join(branch_prompt_names())}"
        )
    if not JOIN_POLICY_PATTERN.fullmatch(options.policy):
        raise GrammarError(
            f'{where}: policy {options.policy[:60]}, expected "all", "first", "quorum:k" or "deadline:s"'
        )


def check_dialect_name(name: str) -> str:
    """Return a name if a dialect can be registered by it: requests, files and command lines have to be able to hold it.

    Raises:
        GrammarError: It is something else.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}", name):
        raise GrammarError(
            f"the dialect {name[:80]!r}: expected a name of at most 64 letters, digits, '_', '-', '+' and '.'; "
            "it is the name of the file"
        )
    return name
