"""Hogwild! inference: workers with one shared history of steps, emulated by chunks on any engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.collaborative import Agent, write_chunk
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import CollaborativeTask, Task, require_family
from sgl_apr.methods.voting import vote


@dataclass
class StepAgent(Agent):
    """An agent whose text is its current step.

    Attributes:
        steps: The steps that it has finished.
        opening: The text that begins its next step.
        answer: Its answer, empty as long as it has none.
    """

    steps: list[str] = field(default_factory=list)
    opening: str = ""
    answer: str = ""


async def hogwild(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    workers: int = 2,
    chunk: int = 32,
    every: int = 1024,
    enough: int = 1,
    **options: Any,
) -> MethodResult:
    """Hogwild! Inference (Rodionov 2025, arXiv 2504.06261, sections 3.2 and 3.3), emulated by chunks: its claims about
    speed do not carry over.

    Each worker sees the problem, the steps that any worker has finished, the current steps of the others, and its own
    current step, which it continues (the combined layout). A step ends with a sentence and a paragraph, and moves to
    the end of the history. In the paper a worker sees every token of the others at once, in shared keys and values.
    Here all workers write `chunk` tokens in parallel and see the others at most `chunk` tokens late, computed again.

    The method ends when `enough` workers have finished a step with an answer, when all have ended, or at the budget.
    (In the prompt of the published code, any worker may answer for all.) At the budget the paper asks once more for
    the answer, and this does not. Then all workers vote.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `CollaborativeTask`.
        workers: Number of workers (2 in the paper's main experiments, appendix D.1).
        chunk: Tokens that a worker writes before it reads the others.
        every: Tokens of all workers after which the next step opens with the question whether it is redundant (1024
            in appendix C).
        enough: Number of answers that end the run.
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `CollaborativeTask`.
    """
    for name, value in (("workers", workers), ("chunk", chunk), ("every", every), ("enough", enough)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    shared = require_family(task, CollaborativeTask)
    context, _ = shared.shared_context_prompt(problem, "", [""] * (workers - 1))
    async with method_session(engine, context, "hogwild", **options) as session:
        width = session.affordable_width(workers, chunk)
        crew = [StepAgent(opening=shared.step_opening(number, 1)) for number in range(1, width + 1)]
        history, last_check = "", 0

        def context_of(worker: StepAgent) -> tuple[str, Prompt]:
            others = [other.text for other in crew if other is not worker]
            text, prompt = shared.shared_context_prompt(problem, worker.text, others, history)
            opening, worker.opening = worker.opening, ""
            return text, replace(prompt, text=prompt.text + opening)

        while await write_chunk(session, crew, context_of, chunk, (shared.step_separator,)):
            total = sum(worker.tokens for worker in crew)
            for number, worker in enumerate(crew, 1):
                complete = shared.is_step_complete(worker.text)
                if worker.text and (worker.ended or complete):
                    history += worker.text if complete else worker.text + shared.step_separator
                    worker.steps.append(worker.text)
                    if worker.ended or shared.has_answer(worker.text):
                        worker.answer = task.answer("".join(worker.steps))
                    worker.text = ""
                    worker.opening = shared.step_opening(number, len(worker.steps) + 1)
                    if total - last_check >= every and not worker.ended:
                        worker.opening += shared.redundancy_question
                        last_check = total
            if all(worker.is_finished for worker in crew) or sum(bool(w.answer) for w in crew) >= enough:
                break
        answers = [worker.answer or task.answer("".join(worker.steps) + worker.text) for worker in crew]
        answer, share = vote(task, answers)
        return MethodResult("hogwild", answer, session.finish(), share, f"hogwild-chunk({chunk})")
