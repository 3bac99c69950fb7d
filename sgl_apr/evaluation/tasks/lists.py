"""Lists of numbers to be sorted or intersected, in halves at once: problems by seed, and verifiers that count errors."""

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
from sgl_apr.evaluation.tasks.chat_template import ChatTemplate, chat_template_for
from sgl_apr.methods.graph_operations import Aggregate, Generate, Graph, KeepBest, Operation, Refine, Score
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.task import Task

ListKind = Literal["sort", "intersect"]
Numbers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ListProblem:
    """Numbers to be sorted; or, with others, those of them that are among these."""

    numbers: Numbers
    others: Numbers | None = None

    @property
    def text(self) -> str:
        """
        >>> Lists((3, 1)).text
        'Sort this list in ascending order: [3, 1]'
        """
        if self.others is None:
            return f"Sort this list in ascending order: {list(self.numbers)}"
        return f"Which numbers of {list(self.numbers)} are also in {list(self.others)}?"

    def count_errors(self, said: Sequence[int]) -> int:
        """Numbers too many and too few, and neighbours in the wrong order where there is one (Besta 2023, sections
        5.1 and 5.2).

        >>> Lists((3, 1, 2)).errors((2, 1, 3)), Lists((3, 1, 2), (1, 3)).errors((2, 1))
        (1, 2)
        """
        wanted = Counter(n for n in self.numbers if self.others is None or n in self.others)
        wrong = (wanted - Counter(said)) + (Counter(said) - wanted)
        return wrong.total() + sum(a > b for a, b in pairwise(said) if self.others is None)


class ListTask(Task[ListProblem, Numbers]):
    """For a model that follows instructions."""

    name = "lists"

    def __init__(self, engine: Engine, chat: ChatTemplate | None = None) -> None:
        super().__init__(engine)
        self.chat = chat or chat_template_for(engine.tokenizer)

    def begin(self, problem: ListProblem) -> Numbers:
        return ()

    def solved(self, state: Numbers) -> str:
        return json.dumps(state)

    def verify(self, problem: ListProblem, answer: str) -> bool:
        return problem.count_errors(json.loads(answer or "[]")) == 0

    def graph(self, problem: ListProblem) -> Graph:
        """Five tries at each half, five at putting the best two together, and one at what is wrong then.

        The paper has the model cut the list too, larger ones into more parts (Besta 2023, arXiv 2308.09687, section 5.1).
        """
        half, merge = len(problem.numbers) // 2, "Merge these into one sorted list"
        graph: dict[str, Operation] = {}
        for side, part in (("left", problem.numbers[:half]), ("right", problem.numbers[half:])):
            graph |= self._tried(side, replace(problem, numbers=part))
        if problem.others is not None:
            merge = "Put these into one list"

        def merged(parts: Sequence[Numbers]) -> Prompt:
            return self._list(f"{merge}: {', '.join(str(list(part)) for part in parts)}", problem)

        def mended(said: Numbers) -> Prompt | None:
            wrong = f"{problem.text}\nThis is not right: {list(said)}"
            return self._list(wrong, problem) if problem.count_errors(said) else None

        best = ("left best", "right best")
        return graph | {
            "merged": Aggregate(ask=merged, read=_read, k=5, depends_on=best),
            "scored": Score(score=lambda said: -problem.count_errors(said), depends_on=("merged",)),
            "best": KeepBest(depends_on=("scored",)),
            "mended": Refine(ask=mended, read=_read, depends_on=("best",)),
        }

    def _tried(self, side: str, part: ListProblem) -> Graph:
        return {
            side: Generate(ask=lambda _: self._list(part.text, part), read=_read, k=5),
            f"{side} scored": Score(score=lambda said: -part.count_errors(said), depends_on=(side,)),
            f"{side} best": KeepBest(depends_on=(f"{side} scored",)),
        }

    def _list(self, told: str, problem: ListProblem) -> Prompt:
        asked = self.chat.turn(f"{told}\nSay the list only, like [1, 2, 2].")
        return Prompt(f"{asked}[", tokens=4 * len(problem.numbers) + 4, stop=("]",))


def _read(_: object, text: str) -> list[Numbers]:
    return [tuple(map(int, re.findall(r"\d{1,9}", text.partition("]")[0])))]


def generate_problems(kind: ListKind, count: int, *, size: int = 16, seed: int = 0) -> Iterator[ListProblem]:
    """The same for the same arguments: digits to sort, or two sets, half of whose numbers are in both on average."""
    rng = random.Random(f"{kind} {size} {seed}")
    for _ in range(count):
        if kind == "sort":
            yield ListProblem(tuple(rng.randint(0, 9) for _ in range(size)))
        else:
            yield ListProblem(*(tuple(rng.sample(range(2 * size), size)) for _ in range(2)))
