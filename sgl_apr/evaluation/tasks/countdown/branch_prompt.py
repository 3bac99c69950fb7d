"""Countdown's branch prompt: a sub search starts at one node of the search tree, and returns the path to the goal."""

from __future__ import annotations

import re

from sgl_apr.formats.branch_prompts import BranchPrompt

_STATE = r"(\d{1,9}:\[[\d, ]{0,200}\])"
_NODE = re.compile(
    rf"Moving to Node #([\d,]{{1,40}})\nCurrent State: {_STATE}, Operations: \[([^\]\n]{{0,400}})\]"
    rf"|Generated Node #([\d,]{{1,40}}): {_STATE} Operation: ([^\n]{{1,60}})"
)
_GOAL = "Goal Reached\n"


def node_prompt(context: str, node: str) -> str:
    """Return the first lines of a search that starts at a node (APR, arXiv 2504.15466, appendix).

    Args:
        context: The text of the parent's search, which names the state of each node.
        node: The node, for example `0,1`.

    Returns:
        The node with its state and the operations that led to it; only the node if the context does not name it.
    """
    states: dict[str, tuple[str, list[str]]] = {}
    for match in _NODE.finditer(context):
        visited, state, operations, generated, new_state, operation = match.groups()
        if visited is not None:
            states.setdefault(visited, (state, re.findall(r"'([^']*)'", operations)))
        else:
            parent_operations = states.get(generated.rpartition(",")[0], ("", []))[1]
            states.setdefault(generated, (new_state, [*parent_operations, operation]))
    if node not in states:
        return f"Moving to Node #{node}\n"
    state, steps = states[node]
    return f"Moving to Node #{node}\nCurrent State: {state}, Operations: {steps}\n"


def goal_path(body: str) -> str:
    """Return the path to the goal, which follows the line that announces it; empty if the goal was not reached."""
    _, announcement, path = body.partition(_GOAL)
    return path.strip() + "\n" if announcement and path.strip() else ""


COUNTDOWN_PROMPT = BranchPrompt(node_prompt, goal_path)
