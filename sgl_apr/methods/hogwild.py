"""Hogwild! inference: workers with one shared history of steps, token by token or emulated by chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.collaborative import Agent, runs_exactly, write_chunk
from sgl_apr.methods.group_run import GroupRun, GroupWorker
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
    exact: bool | None = None,
    **options: Any,
) -> MethodResult:
    """Hogwild! Inference (Rodionov 2025, arXiv 2504.06261, sections 3.2 and 3.3).

    Each worker sees the problem, the steps that any worker has finished, the current steps of the others, and its own
    current step, which it continues (the combined layout). A step that has ended moves to the end of the history. A
    worker sees every token of the others at once, in shared keys and values.

    An engine with groups of workers (`Engine.groups`) runs it so, and the label is "hogwild-exact". There a step ends
    with `CollaborativeTask.step_separator`, and the model opens its next steps itself: only the first one is opened for
    it, and it is not asked whether a step is redundant. Otherwise the method is emulated by chunks, and the label is
    "hogwild-chunk(c)": all workers write `chunk` tokens in parallel and see the others at most `chunk` tokens late,
    computed again, so the paper's claims about speed do not carry over. There a step ends with a sentence and a
    paragraph, and the next one is opened by name.

    The method ends when `enough` workers have finished a step with an answer, when all have ended, or at the budget.
    (In the prompt of the published code, any worker may answer for all.) At the budget the paper asks once more for
    the answer, and this does not. Then all workers vote.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `CollaborativeTask`.
        workers: Number of workers (2 in the paper's main experiments, appendix D.1).
        chunk: Tokens that a worker writes before it reads the others. An exact run starts no more workers than the budget
            pays for with so many tokens each.
        every: Tokens of all workers after which the next step opens with the question whether it is redundant (1024
            in appendix C). Only where the method is emulated.
        enough: Number of answers that end the run.
        exact: Whether each token has to see all tokens so far. None: where the engine has groups of workers, and without
            tools. False: emulate it.
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `CollaborativeTask`.
        UnsupportedEngine: With `exact=True`, if the engine has no such groups.
    """
    for name, value in (("workers", workers), ("chunk", chunk), ("every", every), ("enough", enough)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    shared = require_family(task, CollaborativeTask)
    if runs_exactly(engine, "hogwild", exact, options):
        return await _work_exactly(engine, problem, shared, workers, chunk, enough, options)
    context, prompt = shared.shared_context_prompt(problem, "", [""] * (workers - 1))
    root = Prompt(context, quoted=prompt.quoted)
    async with method_session(engine, root, "hogwild", **options) as session:
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


async def _work_exactly(
    engine: Engine,
    problem: Any,
    task: CollaborativeTask[Any],
    workers: int,
    chunk: int,
    enough: int,
    options: Mapping[str, Any],
) -> MethodResult:
    """Let the workers decode as one group."""
    context, prompts = task.worker_prompts(problem, workers, "hogwild")
    step_end = task.step_separator

    def answer_of(worker: GroupWorker) -> str:
        """The answer of a worker that has ended, or has finished a step with an answer; else empty."""
        finished = worker.text if worker.ended else worker.text[: worker.step_ends]
        answered = worker.ended or any(map(task.has_answer, filter(None, finished.split(step_end))))
        return task.answer(finished) if answered else ""

    def is_enough(crew: Sequence[GroupWorker]) -> bool:
        return sum(bool(answer_of(worker)) for worker in crew) >= enough

    root = Prompt(context, quoted=prompts[0].quoted)
    async with method_session(engine, root, "hogwild", **options) as session:
        width = session.affordable_width(workers, chunk)
        run = GroupRun(session, engine, "hogwild", prompts[:width], step_end=step_end, is_enough=is_enough)
        crew = await run.run()
        answer, share = vote(task, [answer_of(worker) or task.answer(worker.text) for worker in crew])
        return MethodResult("hogwild", answer, session.finish(), share, "hogwild-exact")
