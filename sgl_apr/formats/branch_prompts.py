"""What a branch with a context of its own is told, and what of its work comes back; it runs nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from sgl_apr.errors import GrammarError


@dataclass(frozen=True, slots=True)
class BranchPrompt:
    """How messages pass: `tell(context, outline)` makes the branch's whole prompt of what the parent has
    written and of the call; `answer(body)` what its text says to the parent, empty for no result. `answer`
    is asked only where the grammar has no closer that holds the answer.
    """

    make_prompt: Callable[[str, str], str]
    extract_result: Callable[[str], str]


def _countdown_state(context: str, node: str) -> str:
    """A node as its own search would begin: its state and the operations that led to it (APR, appendix)."""
    states: dict[str, tuple[str, list[str]]] = {}
    for found in re.finditer(_NODE, context):
        moved, state, operations, generated, made, operation = found.groups()
        if moved is not None:
            states.setdefault(moved, (state, re.findall(r"'([^']*)'", operations)))
        else:
            before = states.get(generated.rpartition(",")[0], ("", []))[1]
            states.setdefault(generated, (made, [*before, operation]))
    if node not in states:
        return f"Moving to Node #{node}\n"
    state, steps = states[node]
    return f"Moving to Node #{node}\nCurrent State: {state}, Operations: {steps}\n"


_STATE = r"(\d{1,9}:\[[\d, ]{0,200}\])"
_NODE = (
    rf"Moving to Node #([\d,]{{1,40}})\nCurrent State: {_STATE}, Operations: \[([^\]\n]{{0,400}})\]"
    rf"|Generated Node #([\d,]{{1,40}}): {_STATE} Operation: ([^\n]{{1,60}})"
)
_REACHED = "Goal Reached\n"


def _countdown_answer(body: str) -> str:
    """The path to the goal, which stands behind the line that says that it was reached; empty without one."""
    _, reached, path = body.partition(_REACHED)
    return path.strip() + "\n" if reached and path.strip() else ""


BRANCH_PROMPTS = {
    "outline": BranchPrompt(lambda context, outline: outline, lambda body: body.strip()),
    "countdown": BranchPrompt(_countdown_state, _countdown_answer),
}


def branch_prompt(name: str) -> BranchPrompt:
    """The brief of that name; raises `GrammarError` that lists the names."""
    if name not in BRANCH_PROMPTS:
        raise GrammarError(f"no brief {name!r}, expected one of {', '.join(BRANCH_PROMPTS)}")
    return BRANCH_PROMPTS[name]
