"""Answers in time: Countdown problems, each answered within so many seconds with whatever has been found by then.

python examples/deadline.py [--seconds 2] [--count 4] [--seed 0] [--model builtin]
python examples/deadline.py --url URL

Branches have 70% of the time. Those that are not done then are cut where they are, and the answer is made of the others, behind
one fork at the most; the budget sees to it that the whole reply is in time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import ExitStack

from rich.console import Console
from rich.progress import track

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.attempts import Attempt, final_solution
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems
from sgl_apr.training.models import locate_model
from sgl_apr.views.tree import render_summary

SLACK = 0.5  # seconds: a step of the engine, on a machine that others use


async def solve(url: str, given: list[Problem], seconds: float) -> list[Attempt]:
    """One after another, so that each has the machine for itself."""
    budget = apr.Budget(tokens=6000, width=16, branch_tokens=160, seconds=seconds)
    policy, made = f"deadline:{0.7 * seconds:g}", list[Attempt]()
    async with await apr.HttpEngine.connect(url) as engine:
        for problem in track(given, "in time", console=Console(stderr=True)):
            trajectory = await apr.areason(
                engine, problem.text, budget=budget, policy=policy, max_blocks=1, temperature=0.0
            )
            made.append(Attempt(problem, trajectory))
    return made


def main() -> None:
    """Ask, show what was joined in time, and print one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="builtin", help="a checkpoint, served for the time being")
    which.add_argument("--url", help="a running server")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each problem (default: %(default)s)")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with ExitStack() as stack:
        url = options.url or stack.enter_context(apr.Server(locate_model(options.model))).url
        given = list(generate_problems(options.count, "test", seed=options.seed))
        made = asyncio.run(solve(url, given, options.seconds))
    console = Console(width=125)
    branches = [branch for a in made for block in a.trajectory.blocks for branch in block.branches]
    for a in made:
        outcomes = [branch.outcome for block in a.trajectory.blocks for branch in block.branches]
        joined = f"{outcomes.count('ok')} of {len(outcomes)} branches in time" if outcomes else "no fork"
        said = final_solution(a.trajectory).strip() or "no answer"
        console.print(
            f"{a.problem.text.strip()}: {said} ({'right' if a.correct else 'not solved'}, {joined})",
            markup=False,
        )
    console.print(render_summary({a.problem.text: a.trajectory for a in made}))
    longest = max(a.trajectory.wall_s for a in made)
    figures = {
        "ok": longest <= options.seconds + SLACK,
        "problems": len(made),
        "solved": sum(a.correct for a in made),
        "branches": len(branches),
        "in_time": sum(branch.outcome == "ok" for branch in branches),
        "seconds": options.seconds,
        "longest_s": round(longest, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
