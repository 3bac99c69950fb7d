"""A symbolic search of Countdown, written out as a model is to write it: in a line, or with sub searches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sgl_apr.evaluation.tasks.countdown.problems import Problem, Step, legal_steps, numbers_after

TOKEN = re.compile(r" ?\d+|.", re.DOTALL)
CONCLUSION_TOKENS = 20  # tokens of the longest conclusion
SOLUTION_MARK, NO_SOLUTION_MARK = "!", "?"  # what a solution begins with, and what stands for none


@dataclass(frozen=True, slots=True)
class SearchTrace:
    """Lines of a search, and the steps that reach the target, if they did."""

    text: str
    solution: tuple[Step, ...] | None


def conclusion(solution: Sequence[Step] | None) -> str:
    """
    >>> conclusion([Step(3, "+", 7, 10), Step(8, "+", 10, 18)])
    '! 3+ 7= 10, 8+ 10= 18'
    """
    return NO_SOLUTION_MARK if solution is None else SOLUTION_MARK + ",".join(step.text for step in solution)


def extract_solution(text: str) -> str:
    """That of a text behind the last join.

    >>> solution(" 5- 4= 1, 19> 20! 5- 4= 1, 1+ 19= 20")
    ' 5- 4= 1, 1+ 19= 20'
    """
    return text.rstrip().rpartition("\n")[2].partition(SOLUTION_MARK)[2]


def search_last_pair(numbers: Sequence[int], target: int) -> SearchTrace:
    """The results of all steps on the last two numbers, up to the target.

    >>> last((10, 12), 22).text
    ' 22'
    """
    text = ""
    for step in legal_steps(numbers):
        text += f" {step.result}"
        if step.result == target:
            return SearchTrace(text, (step,))
    return SearchTrace(text, None)


def search_small(numbers: Sequence[int], target: int) -> SearchTrace:
    """All of a search from two or three numbers, in a fixed order, up to the first solution.

    A line says a step, the number it leaves, and what the two of them give. Only a target is written before a
    colon, so that a small model finds it by that, and its text ends with it where it is reached.

    >>> low((4, 5, 19), 20).text
    ' 4+ 5= 9, 19> 28 10\\n 5- 4= 1, 19> 20'
    """
    if len(numbers) == 2:
        found = search_last_pair(numbers, target)
        return SearchTrace(f">{found.text}" if found.solution else f">{found.text}\n", found.solution)
    text = ""
    for step in legal_steps(numbers):
        found = search_last_pair(left := numbers_after(numbers, step), target)
        rest = list(left)
        rest.remove(step.result)
        text += f"{step.text}, {rest[0]}>{found.text}"
        if found.solution:
            return SearchTrace(text, (step, *found.solution))
        text += "\n"
    return SearchTrace(text, None)


def count_tokens(text: str) -> int:
    """How many a text has where every number is one, and so is every other character."""
    return len(TOKEN.findall(text))


def sequential_search(problem: Problem, max_tokens: int) -> str:
    """The whole reply of a search in a line, in at most so many tokens: it gives up where its next part has no room.

    All steps are taken in their fixed order, in which a small model learns soon to leave none out and to repeat none.
    """
    text, solution = "\n", None
    if len(problem.numbers) < 4:
        found = search_small(problem.numbers, problem.target)
        text, solution = text + found.text, found.solution
    else:
        for step in legal_steps(problem.numbers):
            left = numbers_after(problem.numbers, step)
            found = search_small(left, problem.target)
            part = f"{step.text};{''.join(f' {n}' for n in left)}\n{found.text}"
            if count_tokens(text + part) > max_tokens - CONCLUSION_TOKENS:
                break
            text += part
            if found.solution:
                solution = (step, *found.solution)
                break
    return text + conclusion(solution)
