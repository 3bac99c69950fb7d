"""Several chains of thought at once, and the answer that most of them end with."""

from __future__ import annotations

from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import Task
from sgl_apr.methods.voting import vote


async def self_consistency(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any, Any],
    n: int = 40,
    temperature: float = 0.7,
    **options: Any,
) -> MethodResult:
    """Sample `n` chains and take the answer with the most votes (Wang 2022, arXiv 2203.11171, section 2).

    40 paths at T = 0.7 are the paper's (section 3.1); a budget that does not bear as many has fewer. Its vote is
    the unweighted one. Of answers with as many votes it is the one of the first chain.
    """
    ask = task.ask(problem)
    options = {**options, "temperature": temperature}
    async with method_session(engine, ask.text, "self_consistency", **options) as thoughts:
        paths = thoughts.affordable_width(n, task.max_tokens)
        found = await thoughts.fork(thoughts.root, [ask.without_text] * paths)
        answer, share = vote(task, [task.answer(t.text) for t in found])
        return MethodResult("self_consistency", answer, thoughts.finish(), share)
