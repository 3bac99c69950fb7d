"""PaCoRe: rounds of parallel replies, each compacted to a message, which the replies of the next round read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import AggregationTask, Task, require_family
from sgl_apr.methods.voting import vote
from sgl_apr.runtime.value_checks import shorten

LOW, MEDIUM, HIGH = (
    (4,),
    (16,),
    (32, 4),
)  # the widths of the paper's three settings (table 1 of its repository)


async def pacore(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    widths: Sequence[int] = LOW,
    temperature: float = 1.0,
    **options: Any,
) -> MethodResult:
    """Parallel Coordinated Reasoning (Hu 2026, arXiv 2601.05593, section 3).

    The replies of a round run in parallel. Each is compacted to a message (`AggregationTask.compact`), and all messages stand
    in the prompt of the next round. The last round has one reply, whose answer is the result; where it has none, the replies
    before it vote. Each round gets a part of the budget by its width.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: An `AggregationTask`.
        widths: How many replies each round before the last has: `LOW`, `MEDIUM` or `HIGH` in the paper.
        temperature: Sampling temperature (1.0 in the paper).
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `AggregationTask`.
    """
    is_list = isinstance(widths, Sequence) and not isinstance(widths, str)
    if not is_list or not widths or not all(type(width) is int and width >= 1 for width in widths):
        raise AprError(f"widths={shorten(widths)}, expected a list of whole numbers from 1, such as [32, 4]")
    aggregated = require_family(task, AggregationTask)
    first = aggregated.prompt(problem)
    options = {**options, "temperature": temperature}
    async with method_session(engine, first, "pacore", **options) as session:
        rounds = [*widths, 1]
        replies = list[Completion]()
        answers = list[str]()
        for number, wanted in enumerate(rounds):
            share = wanted / sum(rounds[number:])
            width = session.affordable_width(wanted, task.max_tokens, share)
            if replies:
                messages = [aggregated.compact(reply.text) for reply in replies]
                prompt = aggregated.aggregation_prompt(problem, messages)
                context = (prompt.text, replies, prompt.without_text)
                written = await session.sample_with_context([context] * width, share=share)
            else:
                written = await session.fork(session.root, [first.without_text] * width, share=share)
            replies = [reply for reply in written if reply.text.strip()] or replies
            answers = [answer for reply in written if (answer := task.answer(reply.text))] or answers
        answer, _ = vote(task, answers)
        return MethodResult("pacore", answer, session.finish())
