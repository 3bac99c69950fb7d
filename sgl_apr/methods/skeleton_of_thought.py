"""Skeleton of thought: the points of an answer first, then all of them written out in parallel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import SkeletonTask, Task, require_family

Mode = Literal["prompt", "fork"]
LABELS = {"prompt": "exact", "fork": "fork-of-skeleton"}
MAX_POINTS = 10


async def skeleton_of_thought(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    mode: Mode = "prompt",
    temperature: float = 0.0,
    **options: Any,
) -> MethodResult:
    """Skeleton-of-Thought (Ning 2023, arXiv 2307.15337, section 2): a skeleton of 3 to 10 points of 3 to 5 words,
    all of them written out in parallel, and concatenated in their order.

    Points after the tenth are left out. A point that fails contributes only its heading. A reply without points is
    itself the answer. The label of the result says which mode ran.

    Args:
        engine: The engine that decodes.
        problem: A problem of the task.
        task: A `SkeletonTask`.
        mode: "prompt" writes each point in a context of its own, which shows the question and the skeleton (as in the
            paper). "fork" writes it after the skeleton itself, which is then cached completely.
        temperature: Sampling temperature.
        options: Those of `MethodSession`; a budget's `width` limits how many points are written at a time.

    Raises:
        Inapplicable: If the task is no `SkeletonTask`.
    """
    if mode not in get_args(Mode):
        raise AprError(f'mode={mode!r}, expected "prompt" or "fork"')
    pointwise = require_family(task, SkeletonTask)
    outline, options = pointwise.skeleton_prompt(problem), {**options, "temperature": temperature}
    async with method_session(engine, outline, "skeleton_of_thought", **options) as session:
        skeleton = await session.continue_from(session.root, outline.without_text)
        points = list(enumerate(pointwise.points(skeleton.text)[:MAX_POINTS], 1))
        shown = skeleton.text if mode == "prompt" else None
        prompts = [pointwise.point_prompt(problem, shown, number, point) for number, point in points]
        written = list[Completion]()
        while len(written) < len(prompts):
            batch = prompts[len(written) :][: session.budget.width]
            share = len(batch) / (len(prompts) - len(written))
            if mode == "prompt":
                batch = [replace(prompt, depends_on=(skeleton,)) for prompt in batch]
                written += await session.sample_independent(batch, share=share)
            else:
                written += await session.fork(skeleton, batch, share=share)
        parts = [
            f"{number}. {point}{completion.text.rstrip()}"
            for (number, point), completion in zip(points, written, strict=True)
        ]
        answer = task.answer("\n".join(parts) if parts else skeleton.text)
        return MethodResult("skeleton_of_thought", answer, session.finish(), label=LABELS[mode])
