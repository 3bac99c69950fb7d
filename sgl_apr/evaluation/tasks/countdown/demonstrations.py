"""Demonstrations of Countdown to learn from: trajectories of the symbolic search."""

from __future__ import annotations

import random
from dataclasses import replace

from sgl_apr.engine.scripted import ScriptedEngine
from sgl_apr.evaluation.tasks.countdown.branch_experts import expert_for
from sgl_apr.evaluation.tasks.countdown.expert import SearchStyle
from sgl_apr.evaluation.tasks.countdown.problems import Problem
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.formats.options import JoinMethod
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.loop import areason
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory


async def demonstration(
    problem: Problem,
    tokenizer: Tokenizer,
    *,
    seed: int,
    style: SearchStyle | None = None,
    target_dialect: Dialect | str = "spawn",
    state_width: bool = False,
) -> Trajectory:
    """The trajectory of the expert's search of a problem, recorded by the loop.

    A block is joined by message or as text. `build_training_tree(..., join="kv")` makes the training tree of a join in the
    cache from the latter.

    Args:
        problem: The problem.
        tokenizer: Tokenizes the text.
        seed: Seed of the random choices.
        style: How the expert searches.
        target_dialect: The format of the reply.
        state_width: Give all forks of the trajectory one width, drawn from the style's, and state it in the prompt.

    Raises:
        AprError: There is no expert for the dialect.
    """
    target = dialect(target_dialect) if isinstance(target_dialect, str) else target_dialect
    rng, style, stated = random.Random(f"{seed} {problem.text}"), style or SearchStyle(), None
    if state_width:
        stated = rng.randint(*style.width)
        style = replace(style, width=(stated, stated))
    engine = ScriptedEngine(expert_for(problem, rng, style, target), tokenizer)
    budget = Budget(tokens=1 << 20, depth=min(style.depth, target.max_depth))
    join: JoinMethod | None = "text" if "text" in target.joins else None
    if target.unlabelled_branches or "trunk" not in target.grammar.rules:
        width = rng.randint(max(style.width[0], target.min_width), min(style.width[1], target.max_width))
        budget = replace(budget, width=width)
    return await areason(
        engine, problem.prompt(stated), target, budget=budget, join=join, pacing=None, policy="all"
    )
