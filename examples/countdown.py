"""Countdown problems for a model that has learned when to fork, with the trees that it chose.

python examples/countdown.py [--model runs/rl/model] [--count 6] [--seed 0]     # see docs/training.md
python examples/countdown.py --url URL
"""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import ExitStack

from rich.console import Console

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS, Attempt, attempt_problems
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems
from sgl_apr.training.models import locate_model
from sgl_apr.views.tree import render_summary, render_tree


async def solve(url: str, given: list[Problem]) -> list[Attempt]:
    """All of them at once, greedily; the model decides whether it forks, and into how many."""
    async with await apr.HttpEngine.connect(url) as engine:
        budget = apr.Budget(tokens=6000, width=16, branch_tokens=160)
        return await attempt_problems(engine, given, None, budget=budget, temperature=0.0)


def main() -> None:
    """Ask, show the trees and the figures, and print one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="builtin", help="a checkpoint, served for the time being")
    which.add_argument("--url", help="a running server")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(width=125)
    with ExitStack() as stack:
        url = options.url or stack.enter_context(apr.Server(locate_model(options.model), **SERVER_OPTIONS)).url
        made = asyncio.run(solve(url, list(generate_problems(options.count, "test", seed=options.seed))))
    for attempt in made:
        said = "solved" if attempt.correct else "not solved"
        console.print(
            render_tree(
                attempt.trajectory, f"make {attempt.problem.target} of {attempt.problem.numbers}: {said}"
            )
        )
    console.print(render_summary({a.problem.text: a.trajectory for a in made}))
    metrics = [a.trajectory.metrics() for a in made]
    figures = {
        "ok": all(apr.dialect(a.trajectory.dialect).is_valid(a.trajectory.text) for a in made),
        "problems": len(made),
        "solved": sum(a.correct for a in made),
        "forked": sum(m.blocks > 0 for m in metrics),
        "branches": sum(m.branches for m in metrics),
        "total_tokens": sum(m.total for m in metrics),
        "critical_path": sum(m.critical_path for m in metrics),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
