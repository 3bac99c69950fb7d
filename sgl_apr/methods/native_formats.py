"""Models that write their own forks: the published formats, each run by the one loop. What is fixed is elsewhere."""

from __future__ import annotations

from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import dialect
from sgl_apr.formats.options import Join
from sgl_apr.formats.presets import dialect_for, preset
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.task import Task
from sgl_apr.runtime.loop import areason


async def threadweaver(engine: Engine, problem: Any, *, task: Task[Any, Any], **options: Any) -> MethodResult:
    """ThreadWeaver (arXiv 2512.07843): outlines, threads, a join by text. Options are those of `areason`."""
    return await _answered("threadweaver", "threadweaver", engine, problem, task, options)


async def multiverse(engine: Engine, problem: Any, *, task: Task[Any, Any], **options: Any) -> MethodResult:
    """Multiverse (arXiv 2506.09991): goal, paths, conclusion, joined in the KV cache where the engine can."""
    return await _answered("multiverse", "multiverse", engine, problem, task, options)


async def npr(engine: Engine, problem: Any, *, task: Task[Any, Any], **options: Any) -> MethodResult:
    """Native Parallel Reasoner: guideline, plans, steps, takeaway, joined in the KV cache where the engine can."""
    return await _answered("npr", "npr", engine, problem, task, options)


async def parallel_r1(engine: Engine, problem: Any, *, task: Task[Any, Any], **options: Any) -> MethodResult:
    """Parallel-R1 (arXiv 2509.07980): paths without outlines, and a summary."""
    return await _answered("parallel_r1", "parallel_r1", engine, problem, task, options)


async def parathinker(engine: Engine, problem: Any, *, task: Task[Any, Any], **options: Any) -> MethodResult:
    """ParaThinker (2025): paths from one position at once, which the first to end stops, and a summary of all.

    Its learned branch embeddings are not there: "parathinker-style".
    """
    return await _answered("parathinker", "parathinker", engine, problem, task, options)


async def apr(engine: Engine, problem: Any, *, task: Task[Any, Any], **options: Any) -> MethodResult:
    """APR (Pan 2025, arXiv 2504.15466): spawn with messages, join with what they return."""
    return await _answered("apr", "spawn", engine, problem, task, options)


async def _answered(
    name: str, by: str, engine: Engine, problem: Any, task: Task[Any, Any], options: dict[str, Any]
) -> MethodResult:
    written = dialect(by)
    join: Join = options.get("join") or written.published_join
    if not options.get("join") and (join not in written.joins or (join == "kv" and not engine.joins_kv)):
        join = "text"  # the model's own way is not to be had here, and the label says so; what is asked for is an error
    prompt = task.prompt(problem, _instruction(name))
    trajectory = await areason(engine, prompt, written, **{**options, "join": join})
    return MethodResult(
        name, task.answer(trajectory.answer), trajectory, label=_label(name, by, join, engine)
    )


def _instruction(name: str) -> str:
    """What a model has to be told so that it forks, where its authors say."""
    try:
        return preset(name).instruction
    except AprError:
        return ""


def _label(name: str, by: str, join: Join, engine: Engine) -> str:
    """What was run: its own way of joining, and a model that knows its tags, or not."""
    said = ["parathinker-style"] if name == "parathinker" else []
    if join != dialect(by).published_join:
        said.append(f"joined by {join}")
    if dialect_for(engine.tokenizer) is not dialect(by):
        said.append("by grammar alone: the model does not know its tags")
    return ", ".join(said) or "exact"
