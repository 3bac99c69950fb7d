"""Workers that write into one shared history of steps and see each other's unfinished ones; by chunks, on any engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.collaborative import Agent, write_chunk
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import Task
from sgl_apr.methods.voting import vote


@dataclass
class Worker(Agent):
    """A thinker whose text is its current step. `steps` are those that it has finished; `opening` is what the next
    begins with."""

    steps: list[str] = field(default_factory=list)
    opening: str = ""
    answer: str = ""


async def hogwild(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any, Any],
    workers: int = 2,
    chunk: int = 32,
    every: int = 1024,
    enough: int = 1,
    **options: Any,
) -> MethodResult:
    """Hogwild! Inference (Rodionov 2025, arXiv 2504.06261, sections 3.2 and 3.3), emulated by chunks: no claim of it
    about speed carries over.

    Each worker sees the problem, the steps that any of them has finished, the current steps of the others, and its
    own current step, which it goes on with (the combined layout). A step ends with a sentence and a paragraph, and
    moves to the end of the history. There every token of the others is seen at once, in keys and values that are
    shared; here all write `chunk` tokens at once and see at most as many of the others too late, computed again.
    workers: 2 in the paper's main experiments (appendix D.1). every: after so many tokens of all of them (1024:
    appendix C) the next step to begin opens with the question whether it is redundant. It ends when `enough` workers
    have finished a step with an answer (any one may answer, for all: the rules in the prompt of the published code),
    when all have ended, or at the budget, where the paper asks once more and this does not; then they vote.
    """
    for name, value in (("workers", workers), ("chunk", chunk), ("every", every), ("enough", enough)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    begin, _ = task.shared_context_prompt(problem, "", [""] * (workers - 1))
    async with method_session(engine, begin, "hogwild", **options) as thoughts:
        crew = [
            Worker(opening=task.opening(k, 1))
            for k in range(1, thoughts.affordable_width(workers, chunk) + 1)
        ]
        past, checked = "", 0

        def sees(own: Worker) -> tuple[str, Prompt]:
            others = [other.text for other in crew if other is not own]
            text, ask = task.shared_context_prompt(problem, own.text, others, past)
            opening, own.opening = own.opening, ""
            return text, replace(ask, text=ask.text + opening)

        while await write_chunk(thoughts, crew, sees, chunk, (task.pause,)):
            written = sum(one.tokens for one in crew)
            for number, one in enumerate(crew, 1):
                if one.text and (one.ended or task.paused(one.text)):
                    past += one.text if task.paused(one.text) else one.text + task.pause
                    one.steps.append(one.text)
                    if one.ended or task.has_answer(one.text):
                        one.answer = task.answer("".join(one.steps))
                    one.text = ""
                    one.opening = task.opening(number, len(one.steps) + 1)
                    if written - checked >= every and not one.ended:
                        one.opening, checked = one.opening + task.check, written
            if all(one.is_finished for one in crew) or sum(bool(one.answer) for one in crew) >= enough:
                break
        answers = [one.answer or task.answer("".join(one.steps) + one.text) for one in crew]
        answer, share = vote(task, answers)
        return MethodResult("hogwild", answer, thoughts.finish(), share, f"hogwild-chunk({chunk})")
