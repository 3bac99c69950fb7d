"""A symbolic search of Countdown, written out as a model is to write it: in a line, or with sub searches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sgl_apr.evaluation.tasks.countdown.problems import Problem, Step, after, steps

TOKEN = re.compile(r" ?\d+|.", re.DOTALL)
ANSWER = 20  # tokens of the longest conclusion
FOUND, NONE = "!", "?"  # what a solution begins with, and what stands for none


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
    return NONE if solution is None else FOUND + ",".join(step.text for step in solution)


def solution(text: str) -> str:
    """That of a text behind the last join.

    >>> solution(" 5- 4= 1, 19> 20! 5- 4= 1, 1+ 19= 20")
    ' 5- 4= 1, 1+ 19= 20'
    """
    return text.rstrip().rpartition("\n")[2].partition(FOUND)[2]


def last(numbers: Sequence[int], target: int) -> SearchTrace:
    """The results of all steps on the last two numbers, up to the target.

    >>> last((10, 12), 22).text
    ' 22'
    """
    text = ""
    for step in steps(numbers):
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
        found = last(numbers, target)
        return SearchTrace(f">{found.text}" if found.solution else f">{found.text}\n", found.solution)
    text = ""
    for step in steps(numbers):
        found = last(left := after(numbers, step), target)
        rest = list(left)
        rest.remove(step.result)
        text += f"{step.text}, {rest[0]}>{found.text}"
        if found.solution:
            return SearchTrace(text, (step, *found.solution))
        text += "\n"
    return SearchTrace(text, None)


def tokens(text: str) -> int:
    """How many a text has where every number is one, and so is every other character."""
    return len(TOKEN.findall(text))


def sequential(problem: Problem, most: int) -> str:
    """The whole reply of a search in a line, in at most so many tokens: it gives up where its next part has no room.

    All steps are taken in their fixed order, in which a small model learns soon to leave none out and to repeat none.
    """
    text, solution = "\n", None
    if len(problem.numbers) < 4:
        found = search_small(problem.numbers, problem.target)
        text, solution = text + found.text, found.solution
    else:
        for step in steps(problem.numbers):
            left = after(problem.numbers, step)
            found = search_small(left, problem.target)
            part = f"{step.text};{''.join(f' {n}' for n in left)}\n{found.text}"
            if tokens(text + part) > most - ANSWER:
                break
            text += part
            if found.solution:
                solution = (step, *found.solution)
                break
    return text + conclusion(solution)
