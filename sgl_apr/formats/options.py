"""What a grammar cannot say of its dialect: a few declared facts, one line in the file; no tag, no text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sgl_apr.errors import GrammarError
from sgl_apr.formats.branch_prompts import branch_prompt

Sees = Literal["prefix", "message"]
Join = Literal["text", "kv", "message"]
POLICY = re.compile(r"all|first|quorum:[1-9][0-9]*|deadline:(?:[0-9]*[.])?[0-9]+")  # when a join happens


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """Declared in the grammar file as `//@ key value, key value`, or given to `Dialect.from_file`.

    max_width, max_depth: branches of a block, and nesting of blocks, that the format has at most.
    width, min_width: branches of a fork where a budget names no width, and at least; a fork without
        outlines always gets as many as its width.
    first_number: the number of the first branch.
    branch_context: what a branch is conditioned on: "prefix", all before the fork, or "message", its message alone.
    branch_prompt: how that message is made, a name in `sgl_apr.formats.branch_prompts`.
    joins: the joins that work with it, the default first. published_join: the one it was published with.
    policy: when a join happens: "all", "first", or "quorum:k" branches have ended, or after "deadline:s".
    """

    max_width: int = 50
    max_depth: int = 1
    width: int = 8
    min_width: int = 2
    first_number: int = 1
    branch_context: Sees = "prefix"
    branch_prompt: str = "outline"
    joins: tuple[Join, ...] = ("text",)
    published_join: Join = "text"
    policy: str = "all"


def read_facts(declared: Mapping[str, str], where: str) -> dict[str, Any]:
    """The facts of a file as keyword arguments of `Facts`; raises `GrammarError` for what is none."""
    kinds = {f.name: f.default for f in fields(FormatOptions)}
    found: dict[str, Any] = {}
    for key, value in declared.items():
        if key not in kinds:
            raise GrammarError(f"{where}: no fact {key!r}, expected one of {', '.join(kinds)}")
        if isinstance(kinds[key], int):
            if not value.isdecimal():
                raise GrammarError(f"{where}: {key} {value}, expected a number")
            found[key] = int(value)
        else:
            found[key] = tuple(value.split()) if key == "joins" else value
    return found


def check_facts(facts: FormatOptions, where: str) -> None:
    """Raise `GrammarError` where facts contradict one another or name what there is not."""
    if not 1 <= facts.min_width <= facts.width <= facts.max_width:
        raise GrammarError(
            f"{where}: min_width {facts.min_width}, width {facts.width}, max_width {facts.max_width}: "
            "expected 1 <= min_width <= width <= max_width"
        )
    if facts.max_depth < 1:
        raise GrammarError(f"{where}: max_depth {facts.max_depth}, expected 1 or more")
    if facts.branch_context not in get_args(Sees):
        raise GrammarError(
            f"{where}: branch_context {facts.branch_context}, expected {' or '.join(get_args(Sees))}"
        )
    if not facts.joins or not {*facts.joins, facts.published_join} <= set(get_args(Join)):
        raise GrammarError(
            f"{where}: joins {' '.join(facts.joins)}, expected some of {', '.join(get_args(Join))}"
        )
    if ("message" in facts.joins) != (facts.branch_context == "message"):
        raise GrammarError(f"{where}: branches that see a message join by message, and no others do")
    branch_prompt(facts.branch_prompt)
    if not POLICY.fullmatch(facts.policy):
        raise GrammarError(
            f'{where}: policy {facts.policy}, expected "all", "first", "quorum:k" or "deadline:s"'
        )
