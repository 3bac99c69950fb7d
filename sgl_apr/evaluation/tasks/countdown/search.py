"""A symbolic Countdown search, written out in the format that a model is trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sgl_apr.evaluation.tasks.countdown.problems import Problem, Step, legal_steps, numbers_after

TOKEN = re.compile(r" ?\d+|.", re.DOTALL)
CONCLUSION_TOKENS = 20  # of the longest conclusion
SOLUTION_MARK, NO_SOLUTION_MARK = "!", "?"


@dataclass(frozen=True, slots=True)
class SearchTrace:
    """The text of a search, and the steps that reach the target, if it found them."""

    text: str
    solution: tuple[Step, ...] | None


def conclusion(solution: Sequence[Step] | None) -> str:
    """The last line of a search.

    Examples:
        >>> conclusion([Step(3, "+", 7, 10), Step(8, "+", 10, 18)])
        '! 3+ 7= 10, 8+ 10= 18'
    """
    return NO_SOLUTION_MARK if solution is None else SOLUTION_MARK + ",".join(step.text for step in solution)


def extract_solution(text: str) -> str:
    """The solution in the last line of a reply; empty if there is none.

    Examples:
        >>> extract_solution(" 5- 4= 1, 19> 20! 5- 4= 1, 1+ 19= 20")
        ' 5- 4= 1, 1+ 19= 20'
    """
    return text.rstrip().rpartition("\n")[2].partition(SOLUTION_MARK)[2]


def search_last_pair(numbers: Sequence[int], target: int) -> SearchTrace:
    """The results of all steps on the last two numbers, up to the target.

    Examples:
        >>> search_last_pair((10, 12), 22).text
        ' 22'
    """
    text = ""
    for step in legal_steps(numbers):
        text += f" {step.result}"
        if step.result == target:
            return SearchTrace(text, (step,))
    return SearchTrace(text, None)


def search_small(numbers: Sequence[int], target: int) -> SearchTrace:
    """Search all of a problem with two or three numbers in a fixed order, up to the first solution.

    A line has a step, the number that it leaves, and the results of those two. The text ends with the target where it is
    reached; elsewhere the target stands only before a colon, so that a small model can tell by it that the search is over.

    Examples:
        >>> search_small((4, 5, 19), 20).text
        ' 4+ 5= 9, 19> 28 10\\n 5- 4= 1, 19> 20'
    """
    if len(numbers) == 2:
        pair = search_last_pair(numbers, target)
        return SearchTrace(f">{pair.text}" if pair.solution else f">{pair.text}\n", pair.solution)
    text = ""
    for step in legal_steps(numbers):
        pair = search_last_pair(left := numbers_after(numbers, step), target)
        rest = list(left)
        rest.remove(step.result)
        text += f"{step.text}, {rest[0]}>{pair.text}"
        if pair.solution:
            return SearchTrace(text, (step, *pair.solution))
        text += "\n"
    return SearchTrace(text, None)


def count_tokens(text: str) -> int:
    """The number of tokens of a text in which every number is one token, and so is every other character."""
    return len(TOKEN.findall(text))


def search_sequentially(problem: Problem, max_tokens: int) -> SearchTrace:
    """Search without forks, all steps in their fixed order, up to the first solution.

    Args:
        problem: The problem.
        max_tokens: The search of more than three numbers gives up where its next part does not fit.
    """
    if len(problem.numbers) < 4:
        return search_small(problem.numbers, problem.target)
    text = ""
    for step in legal_steps(problem.numbers):
        left = Problem(numbers_after(problem.numbers, step), problem.target)
        line = f"{step.text};{''.join(f' {n}' for n in left.numbers)}\n"
        trace = search_sequentially(left, max_tokens - count_tokens(text + line))
        part = line + trace.text
        if count_tokens(text + part) > max_tokens:
            break
        text += part
        if trace.solution:
            return SearchTrace(text, (step, *trace.solution))
    return SearchTrace(text, None)


def sequential_search(problem: Problem, max_tokens: int) -> str:
    """The complete reply of a sequential search.

    All steps are tried in their fixed order, so that a small model soon learns to leave none out and to repeat none.

    Args:
        problem: The problem.
        max_tokens: The search gives up where its next part does not fit.
    """
    trace = search_sequentially(problem, max_tokens - CONCLUSION_TOKENS - 1)  # a line break comes first
    return f"\n{trace.text}{conclusion(trace.solution)}"
