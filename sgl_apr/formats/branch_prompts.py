"""Branch prompts: how the prompt of a branch with its own context is made, and what its text returns.

A dialect names one with the option `branch_prompt`. A package registers its own with `register_branch_prompt`, or
declares it as an entry point of the group `sgl_apr.branch_prompts`, which is loaded when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sgl_apr.formats.entry_points import installed_entry_points, load_entry_point, unknown_name_error

ENTRY_POINT_GROUP = "sgl_apr.branch_prompts"


@dataclass(frozen=True, slots=True)
class BranchPrompt:
    """How messages pass between a sequence and a branch that does not see its text.

    Attributes:
        make_prompt: Takes the text of the parent's context and the outline of the branch, and returns the
            complete prompt of the branch.
        extract_result: Takes the text of the branch, and returns its result for the parent; an empty string
            means that there is none. Only called if the grammar has no closer that holds the result.
    """

    make_prompt: Callable[[str, str], str]
    extract_result: Callable[[str], str]


_registered = {"outline": BranchPrompt(lambda context, outline: outline, lambda body: body.strip())}


def register_branch_prompt(name: str, prompt: BranchPrompt) -> None:
    """Make a branch prompt available to dialects under a name. A second one of that name replaces the first."""
    _registered[name] = prompt


def branch_prompt_names() -> list[str]:
    """Return the names of all branch prompts, registered and of installed packages."""
    return sorted({*_registered, *(point.name for point in installed_entry_points(ENTRY_POINT_GROUP))})


def has_branch_prompt(name: str) -> bool:
    """Whether there is a branch prompt of that name. Loads nothing."""
    return name in _registered or name in branch_prompt_names()


def branch_prompt(name: str) -> BranchPrompt:
    """Return a branch prompt by name, loading it from an installed package if necessary.

    Raises:
        GrammarError: There is no branch prompt of that name, or its entry point is something else.
    """
    if name not in _registered:
        for point in (p for p in installed_entry_points(ENTRY_POINT_GROUP) if p.name == name):
            prompt: BranchPrompt = load_entry_point(point, BranchPrompt, "a BranchPrompt")
            return prompt
        raise unknown_name_error("branch prompt", name, branch_prompt_names())
    return _registered[name]
