"""Group Think: agents that read each other as they write, token by token or emulated by chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


async def group_think(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    thinkers: int = 4,
    chunk: int = 32,
    enough: int | None = None,
    exact: bool | None = None,
    **options: Any,
) -> MethodResult:
    """Group Think (Hsu 2025, arXiv 2505.11107, section 3).

    Every token sees all tokens of the other agents so far, because they share keys and values. An engine with groups
    of workers (`Engine.groups`) runs it so, and the label is "groupthink-exact". Otherwise it is emulated by chunks,
    and the label is "groupthink-chunk(c)": all agents write `chunk` tokens in parallel. Then each continues after the
    text of the others up to there and its own. It sees them at most `chunk` tokens late, and what it sees is computed
    again, so the paper's claims about speed do not carry over.

    The paper measures how much of a list the agents cover together; their number here and the end are our choice. The
    method ends when `enough` agents have ended with an answer, when all have ended, or at the budget. The agents that
    have ended with an answer vote; if there are none, all vote.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `CollaborativeTask`.
        thinkers: Number of agents; fewer if the budget cannot pay for them.
        chunk: Tokens that an agent writes before it reads the others. An exact run starts no more agents than the budget
            pays for with so many tokens each.
        enough: Number of answers that end the run; None for more than half of the agents.
        exact: Whether each token has to see all tokens so far. None: where the engine has groups of workers, and without
            tools. False: emulate it.
        options: Those of `MethodSession`.

    Raises:
        Inapplicable: If the task is no `CollaborativeTask`.
        UnsupportedEngine: With `exact=True`, if the engine has no such groups.
    """
    for name, value in (("thinkers", thinkers), ("chunk", chunk)):
        if value < 1:
            raise AprError(f"{name}={value}, expected at least 1")
    shared = require_family(task, CollaborativeTask)
    if runs_exactly(engine, "group_think", exact, options):
        return await _think_exactly(engine, problem, shared, thinkers, chunk, enough, options)
    context, prompt = shared.shared_context_prompt(problem, "", [""] * (thinkers - 1))
    root = Prompt(context, quoted=prompt.quoted)
    async with method_session(engine, root, "group_think", **options) as session:
        agents = [Agent() for _ in range(session.affordable_width(thinkers, chunk))]
        quorum = len(agents) // 2 + 1 if enough is None else enough

        def context_of(agent: Agent) -> tuple[str, Prompt]:
            others = [other.text for other in agents if other is not agent]
            return shared.shared_context_prompt(problem, agent.text, others)

        while await write_chunk(session, agents, context_of, chunk):
            answers = [task.answer(agent.text) if agent.ended else "" for agent in agents]
            if all(agent.is_finished for agent in agents) or sum(map(bool, answers)) >= quorum:
                break
        answers = [task.answer(agent.text) if agent.ended else "" for agent in agents]
        answer, share = vote(task, answers if any(answers) else [task.answer(a.text) for a in agents])
        return MethodResult("group_think", answer, session.finish(), share, f"groupthink-chunk({chunk})")


async def _think_exactly(
    engine: Engine,
    problem: Any,
    task: CollaborativeTask[Any],
    thinkers: int,
    chunk: int,
    enough: int | None,
    options: Mapping[str, Any],
) -> MethodResult:
    """Let the agents decode as one group."""
    context, prompts = task.worker_prompts(problem, thinkers, "group_think")
    root = Prompt(context, quoted=prompts[0].quoted)
    async with method_session(engine, root, "group_think", **options) as session:
        width = session.affordable_width(thinkers, chunk)
        quorum = width // 2 + 1 if enough is None else enough

        def answers_of(workers: Sequence[GroupWorker]) -> list[str]:
            return [task.answer(worker.text) if worker.ended else "" for worker in workers]

        def is_enough(workers: Sequence[GroupWorker]) -> bool:
            return sum(map(bool, answers_of(workers))) >= quorum

        run = GroupRun(session, engine, "group_think", prompts[:width], is_enough=is_enough)
        workers = await run.run()
        answers = answers_of(workers)
        answer, share = vote(task, answers if any(answers) else [task.answer(w.text) for w in workers])
        return MethodResult("group_think", answer, session.finish(), share, "groupthink-exact")
