"""The options of a dialect: what its grammar rules cannot express, declared in the grammar file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sgl_apr.errors import GrammarError
from sgl_apr.formats.branch_prompts import branch_prompt_names, has_branch_prompt

BranchContext = Literal["prefix", "message"]
JoinMethod = Literal["text", "kv", "message"]
JOIN_POLICY_PATTERN = re.compile(r"all|first|quorum:[1-9][0-9]*|deadline:(?:[0-9]*[.])?[0-9]+")


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


def parse_options(declared: Mapping[str, str], where: str) -> dict[str, Any]:
    """Convert the declared options of a grammar file to keyword arguments of `FormatOptions`.

    Args:
        declared: Option values as they are written in the file.
        where: The file, for error messages.

    Raises:
        GrammarError: An option is unknown, or its value is not a number where one is expected.
    """
    defaults = {f.name: f.default for f in fields(FormatOptions)}
    options: dict[str, Any] = {}
    for key, value in declared.items():
        if key not in defaults:
            raise GrammarError(f"{where}: no option {key!r}, expected one of {', '.join(defaults)}")
        if isinstance(defaults[key], int):
            if not value.isdecimal():
                raise GrammarError(f"{where}: {key} {value}, expected a number")
            options[key] = int(value)
        else:
            options[key] = tuple(value.split()) if key == "joins" else value
    return options


def validate_options(options: FormatOptions, where: str) -> None:
    """Check that options are consistent and that the names in them exist.

    Raises:
        GrammarError: An option is out of range, unknown, or contradicts another.
    """
    if not 1 <= options.min_width <= options.width <= options.max_width:
        raise GrammarError(
            f"{where}: min_width {options.min_width}, width {options.width}, max_width {options.max_width}: "
            "expected 1 <= min_width <= width <= max_width"
        )
    if options.max_depth < 1:
        raise GrammarError(f"{where}: max_depth {options.max_depth}, expected 1 or more")
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
            f"{where}: no branch prompt {options.branch_prompt!r}, "
            f"expected one of {', '.join(branch_prompt_names())}"
        )
    if not JOIN_POLICY_PATTERN.fullmatch(options.policy):
        raise GrammarError(
            f'{where}: policy {options.policy}, expected "all", "first", "quorum:k" or "deadline:s"'
        )
