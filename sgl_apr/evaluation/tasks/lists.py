"""Lists of numbers to sort or intersect by halves: generated problems, and a verifier that counts errors."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from sgl_apr.engine.base import Engine
from sgl_apr.evaluation.tasks.chat_template import chat_template_for
from sgl_apr.methods.chat_tasks import Chat
from sgl_apr.methods.graph_operations import Aggregate, Generate, Graph, KeepBest, Operation, Refine, Score
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.task import GraphTask

ListKind = Literal["sort", "intersect"]
Numbers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ListProblem:
    """Numbers to sort; with `others`, the numbers to intersect with those."""

    numbers: Numbers
    others: Numbers | None = None

    @property
    def text(self) -> str:
        """The problem in words.

        Examples:
            >>> ListProblem((3, 1)).text
            'Sort this list in ascending order: [3, 1]'
        """
        if self.others is None:
            return f"Sort this list in ascending order: {list(self.numbers)}"
        return f"Which numbers of {list(self.numbers)} are also in {list(self.others)}?"

    def count_errors(self, answer: Sequence[int]) -> int:
        """Extra and missing numbers, and, for sorting, neighbours in the wrong order (Besta 2023, sections 5.1 and 5.2).

        Examples:
            >>> ListProblem((3, 1, 2)).count_errors((2, 1, 3)), ListProblem((3, 1, 2), (1, 3)).count_errors((2, 1))
            (1, 2)
        """
        expected = Counter(n for n in self.numbers if self.others is None or n in self.others)
        wrong = (expected - Counter(answer)) + (Counter(answer) - expected)
        return wrong.total() + sum(a > b for a, b in pairwise(answer) if self.others is None)


class ListTask(GraphTask[ListProblem, Numbers]):
    """Sorting and intersecting, for a model that follows instructions.

    Args:
        engine: Where the model decodes.
        chat: How the model is addressed; by default chosen by its tokenizer.
    """

    name = "lists"

    def __init__(self, engine: Engine, chat: Chat | None = None) -> None:
        super().__init__(engine)
        self.chat: Chat = chat or chat_template_for(engine.tokenizer)

    def initial_state(self, problem: ListProblem) -> Numbers:
        return ()

    def solution(self, state: Numbers) -> str:
        return json.dumps(state)

    def verify(self, problem: ListProblem, answer: str) -> bool:
        return problem.count_errors(json.loads(answer or "[]")) == 0

    def graph(self, problem: ListProblem) -> Graph:
        """Sample five answers to each half, merge the best two in five ways, and correct the best result once.

        In the paper the model also splits the list, and larger lists are split into more parts (Besta 2023, arXiv 2308.09687,
        section 5.1).
        """
        half, merge = len(problem.numbers) // 2, "Merge these into one sorted list"
        graph: dict[str, Operation] = {}
        for side, part in (("left", problem.numbers[:half]), ("right", problem.numbers[half:])):
            graph |= self._best_of_half(side, replace(problem, numbers=part))
        if problem.others is not None:
            merge = "Put these into one list"

        def merge_prompt(parts: Sequence[Numbers]) -> Prompt:
            return self._list_prompt(f"{merge}: {', '.join(str(list(part)) for part in parts)}", problem)

        def correction_prompt(answer: Numbers) -> Prompt | None:
            wrong = f"{problem.text}\nThis is not right: {list(answer)}"
            return self._list_prompt(wrong, problem) if problem.count_errors(answer) else None

        best = ("left best", "right best")
        return graph | {
            "merged": Aggregate(prompt=merge_prompt, read=_parse_list, k=5, depends_on=best),
            "scored": Score(score=lambda answer: -problem.count_errors(answer), depends_on=("merged",)),
            "best": KeepBest(depends_on=("scored",)),
            "corrected": Refine(prompt=correction_prompt, read=_parse_list, depends_on=("best",)),
        }

    def _best_of_half(self, side: str, part: ListProblem) -> Graph:
        return {
            side: Generate(prompt=lambda _: self._list_prompt(part.text, part), read=_parse_list, k=5),
            f"{side} scored": Score(score=lambda answer: -part.count_errors(answer), depends_on=(side,)),
            f"{side} best": KeepBest(depends_on=(f"{side} scored",)),
        }

    def _list_prompt(self, instruction: str, problem: ListProblem) -> Prompt:
        message = self.chat.turn(f"{instruction}\nSay the list only, like [1, 2, 2].")
        return Prompt(f"{message}[", tokens=4 * len(problem.numbers) + 4, stop=("]",))


def _parse_list(_: object, text: str) -> list[Numbers]:
    return [tuple(map(int, re.findall(r"\d{1,9}", text.partition("]")[0])))]


def generate_problems(kind: ListKind, count: int, *, size: int = 16, seed: int = 0) -> Iterator[ListProblem]:
    """Random problems, the same for the same arguments.

    Args:
        kind: "sort" for lists of digits, "intersect" for two sets that share half of their numbers on average.
        count: Number of problems.
        size: Numbers in each list.
        seed: Seed of the problems.
    """
    rng = random.Random(f"{kind} {size} {seed}")
    for _ in range(count):
        if kind == "sort":
            yield ListProblem(tuple(rng.randint(0, 9) for _ in range(size)))
        else:
            yield ListProblem(*(tuple(rng.sample(range(2 * size), size)) for _ in range(2)))
