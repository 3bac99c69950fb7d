"""The points of an answer first, then what each of them says, at once; no point sees what another says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.methods.prompt import Completion
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.session import method_session
from sgl_apr.methods.task import Task

Mode = Literal["prompt", "fork"]
LABELS = {"prompt": "exact", "fork": "fork-of-skeleton"}
MOST = 10  # points


async def skeleton_of_thought(
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any, Any],
    mode: Mode = "prompt",
    temperature: float = 0.0,
    **options: Any,
) -> MethodResult:
    """Skeleton-of-Thought (Ning 2023, arXiv 2307.15337, section 2): a skeleton of 3 to 10 points of 3 to 5 words,
    all of them written out at once, and put together in their order.

    mode: "prompt" asks for each point in a context of its own, which shows the question and the skeleton (the
    paper's); "fork" behind the skeleton itself, which is then cached as a whole. What the result is labelled with
    says which. Points beyond the tenth are left out. A budget with a `width` has no more points written at a time. A
    point that fails has its heading only; a reply without points is the answer itself.
    """
    if mode not in get_args(Mode):
        raise AprError(f'mode={mode!r}, expected "prompt" or "fork"')
    ask, options = task.skeleton(problem), {**options, "temperature": temperature}
    async with method_session(engine, ask.text, "skeleton_of_thought", **options) as thoughts:
        skeleton = await thoughts.continue_from(thoughts.root, ask.without_text)
        points = list(enumerate(task.points(skeleton.text)[:MOST], 1))
        seen = skeleton.text if mode == "prompt" else None
        asks = [task.point(problem, seen, number, point) for number, point in points]
        written = list[Completion]()
        while len(written) < len(asks):
            batch = asks[len(written) :][: thoughts.budget.width]
            of = len(batch) / (len(asks) - len(written))
            if mode == "prompt":
                batch = [replace(ask, depends_on=(skeleton,)) for ask in batch]
                written += await thoughts.sample_independent(batch, of=of)
            else:
                written += await thoughts.fork(skeleton, batch, of=of)
        parts = [
            f"{number}. {point}{thought.text.rstrip()}"
            for (number, point), thought in zip(points, written, strict=True)
        ]
        answer = task.answer("\n".join(parts) if parts else skeleton.text)
        return MethodResult("skeleton_of_thought", answer, thoughts.finish(), label=LABELS[mode])
