"""Models that fork by themselves: the published formats, each run by the fork-join loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sgl_apr.engine.base import Engine
from sgl_apr.engine.quoted_text import encode_quoted
from sgl_apr.errors import AprError
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.formats.options import JoinMethod
from sgl_apr.formats.presets import known_dialects, preset
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.task import SampledTask, Task, require_family
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.loop import areason
from sgl_apr.runtime.option_checks import make_object


async def threadweaver(engine: Engine, problem: Any, *, task: Task[Any], **options: Any) -> MethodResult:
    """ThreadWeaver (arXiv 2512.07843): outlines, threads, a join by text. Options are those of `areason`."""
    return await run_format("threadweaver", "threadweaver", engine, problem, task=task, options=options)


async def multiverse(engine: Engine, problem: Any, *, task: Task[Any], **options: Any) -> MethodResult:
    """Multiverse (arXiv 2506.09991): goal, paths, conclusion, joined in the KV cache where the engine can."""
    return await run_format("multiverse", "multiverse", engine, problem, task=task, options=options)


async def npr(engine: Engine, problem: Any, *, task: Task[Any], **options: Any) -> MethodResult:
    """Native Parallel Reasoner: guideline, plans, steps, takeaway, joined in the KV cache where the engine can."""
    return await run_format("npr", "npr", engine, problem, task=task, options=options)


async def parallel_r1(engine: Engine, problem: Any, *, task: Task[Any], **options: Any) -> MethodResult:
    """Parallel-R1 (arXiv 2509.07980): paths without outlines, and a summary."""
    return await run_format("parallel_r1", "parallel_r1", engine, problem, task=task, options=options)


async def parathinker(engine: Engine, problem: Any, *, task: Task[Any], **options: Any) -> MethodResult:
    """ParaThinker (2025): parallel paths from one position, which the first to end stops, and a summary of all.

    Its learned branch embeddings are missing, so the label is "parathinker-style".
    """
    return await run_format("parathinker", "parathinker", engine, problem, task=task, options=options)


async def apr(engine: Engine, problem: Any, *, task: Task[Any], **options: Any) -> MethodResult:
    """APR (Pan 2025, arXiv 2504.15466): spawn with messages, join with what they return.

    A model that knows the format forks where its budget pays for that (`forks_fit`), and otherwise searches in one reply, which the
    label says. With the option `mode`, as in `mode="auto"`, the budget has no say.
    """
    budget = make_object("budget", options["budget"]) if options.get("budget") is not None else Budget()
    if "mode" in options or forks_fit(budget, task) or not _knows(engine, "spawn"):
        return await run_format("apr", "spawn", engine, problem, task=task, options=options)
    options["mode"] = "sequential"
    result = await run_format("apr", "spawn", engine, problem, task=task, options=options)
    reason = f"{budget.tokens:,} tokens do not pay for a fork"
    return replace(result, label=f"{result.label}, one reply: {reason}")


def forks_fit(budget: Budget, task: Task[Any]) -> bool:
    """Whether a model that forks by itself should: for time, or where there are tokens enough.

    Branches that run at once save time, not tokens: under a small budget a search in one reply comes further.

    Args:
        budget: The budget.
        task: The task, with its `min_fork_tokens`.

    Returns:
        Whether there is a limit on time, or tokens enough.
    """
    in_a_hurry = budget.seconds is not None or budget.critical_tokens is not None
    return in_a_hurry or budget.tokens >= task.min_fork_tokens


async def run_format(
    name: str,
    format_dialect: Dialect | str,
    engine: Engine,
    problem: Any,
    *,
    task: Task[Any],
    options: Mapping[str, Any],
) -> MethodResult:
    """Let a model answer a problem in its format, with the prompt that the task makes for it.

    Args:
        name: The name of the method, by which the instruction of its authors is found.
        format_dialect: The format.
        engine: Where the model decodes.
        problem: The problem.
        task: The kind of problem.
        options: Options of `areason`. Without a join it is the published one where the engine can, else by text.

    Raises:
        AprError: As `areason`; `Inapplicable` if the problems of the task do not fit one prompt.
    """
    sampled = require_family(task, SampledTask)
    form = dialect(format_dialect) if isinstance(format_dialect, str) else format_dialect
    join: JoinMethod = options.get("join") or form.published_join
    if not options.get("join") and (join not in form.joins or (join == "kv" and not engine.joins_kv)):
        join = "text"  # the published join is unavailable, and the label says so; an explicit join stays, and fails
    text, quoted = sampled.prompt_text(problem, _instruction(name)), sampled.prompt(problem).quoted
    prompt = encode_quoted(engine.tokenizer, text, quoted, add_special_tokens=True) if quoted else text
    trajectory = await areason(engine, prompt, form, **{**options, "join": join})
    label = _label(name, form, join, engine)
    return MethodResult(name, task.answer(trajectory.answer), trajectory, label=label)


def _knows(engine: Engine, name: str) -> bool:
    """Whether the model was trained on the format of that name."""
    return dialect(name) in known_dialects(engine.tokenizer)


def _instruction(name: str) -> str:
    """The instruction to fork that the authors of a model publish, empty without one."""
    try:
        return preset(name).instruction
    except AprError:
        return ""


def _label(name: str, form: Dialect, join: JoinMethod, engine: Engine) -> str:
    """How the run differs from the published one: another join, or a model that does not know the tags."""
    notes = ["parathinker-style"] if name == "parathinker" else []
    if join != form.published_join:
        notes.append(f"joined by {join}")
    if form not in known_dialects(engine.tokenizer):
        notes.append("by grammar alone: the model does not know its tags")
    return ", ".join(notes) or "exact"
