"""Thinkers that read each other as they write, each in a line of its own; by chunks, on an engine that knows none of it."""

from __future__ import annotations

from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.collaborative import Agent, write_chunk
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import Task
from sgl_apr.methods.voting import vote


async def group_think(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any, Any],
    thinkers: int = 4,
    chunk: int = 32,
    enough: int | None = None,
    **options: Any,
) -> MethodResult:
    """Group Think (Hsu 2025, arXiv 2505.11107, section 3), emulated by chunks: no claim of it about speed carries over.

    There every token sees all tokens of the others so far, whose keys and values are shared. Here all thinkers write
    `chunk` tokens at once, then each goes on behind the text of the others up to there and its own: it is at most
    `chunk` tokens behind, and what it sees is computed again. The paper measures how much of a list the thinkers cover
    together; how many there are here, and when they are done, is ours: it ends when `enough` of them have ended with
    an answer (None: more than half), when all have ended, or at the budget. Those that have ended with one vote; where
    none has, all do.
    """
    for name, value in (("thinkers", thinkers), ("chunk", chunk)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    begin, _ = task.shared_context_prompt(problem, "", [""] * (thinkers - 1))
    async with method_session(engine, begin, "group_think", **options) as thoughts:
        group = [Agent() for _ in range(thoughts.affordable_width(thinkers, chunk))]
        wanted = len(group) // 2 + 1 if enough is None else enough

        def sees(own: Agent) -> tuple[str, Prompt]:
            return task.shared_context_prompt(
                problem, own.text, [other.text for other in group if other is not own]
            )

        while await write_chunk(thoughts, group, sees, chunk):
            answers = [task.answer(one.text) if one.ended else "" for one in group]
            if all(one.is_finished for one in group) or sum(map(bool, answers)) >= wanted:
                break
        answers = [task.answer(one.text) if one.ended else "" for one in group]
        answer, share = vote(task, answers if any(answers) else [task.answer(one.text) for one in group])
        return MethodResult("group_think", answer, thoughts.finish(), share, f"groupthink-chunk({chunk})")
