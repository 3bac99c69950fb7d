"""Several chains of thought at once, and the answer that most of them end with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.methods.result import Result
from sgl_apr.methods.task import Task
from sgl_apr.methods.thoughts import thinking


async def self_consistency(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any, Any],
    n: int = 40,
    temperature: float = 0.7,
    **options: Any,
) -> Result:
    """Sample `n` chains and take the answer with the most votes (Wang 2022, arXiv 2203.11171, section 2).

    40 paths at T = 0.7 are the paper's (section 3.1); a budget that does not bear as many has fewer. Its vote is
    the unweighted one. Of answers with as many votes it is the one of the first chain.
    """
    ask = task.ask(problem)
    options = {**options, "temperature": temperature}
    async with thinking(engine, ask.text, "self_consistency", **options) as thoughts:
        paths = thoughts.width(n, task.need)
        found = await thoughts.fork(thoughts.root, [ask.behind] * paths)
        answers: dict[Hashable, str] = {}
        votes = Counter[Hashable]()
        for answer in filter(None, (task.answer(t.text) for t in found)):
            votes[task.key(answer)] += 1
            answers.setdefault(task.key(answer), answer)
        best = max(votes, key=votes.__getitem__, default=None)
        share = votes[best] / paths if best is not None else 0.0
        return Result("self_consistency", answers.get(best, ""), thoughts.finish(), share)
