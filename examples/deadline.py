"""Answers in time: Countdown problems, each answered within a number of seconds with whatever has been found by then.

python examples/deadline.py [--seconds 2] [--count 4] [--seed 0] [--model builtin]
python examples/deadline.py --url URL

Branches get 70% of the time. Then the unfinished ones are cut, and the model answers from the others, after at most one
fork. The budget keeps the complete reply within the time.
"""

from __future__ import annotations

import asyncio
import json

from rich.console import Console
from rich.progress import track
from serving import example_parser, served

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.attempts import Attempt, final_solution
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems
from sgl_apr.views.tree import render_summary

SLACK_S = 0.5  # one step of the engine, on a machine that is shared


async def solve(url: str, problems: list[Problem], seconds: float) -> list[Attempt]:
    """Solve one problem after another, so that each has the machine for itself."""
    budget = apr.Budget(tokens=6000, width=16, branch_tokens=160, seconds=seconds)
    policy, attempts = f"deadline:{0.7 * seconds:g}", list[Attempt]()
    async with await apr.HttpEngine.connect(url) as engine:
        for problem in track(problems, "in time", console=Console(stderr=True)):
            trajectory = await apr.areason(
                engine, problem.text, budget=budget, policy=policy, max_blocks=1, temperature=0.0
            )
            attempts.append(Attempt(problem, trajectory))
    return attempts


def outcomes(attempt: Attempt) -> list[str | None]:
    """The outcome of each branch."""
    return [branch.outcome for block in attempt.trajectory.blocks for branch in block.branches]


def main() -> None:
    """Solve the problems, show how many branches were in time, and print one JSON object last."""
    parser = example_parser(__doc__, "builtin")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each problem (default: %(default)s)")
    parser.add_argument("--count", type=int, default=4, help="number of problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with served(options) as url:
        problems = list(generate_problems(options.count, "test", seed=options.seed))
        attempts = asyncio.run(solve(url, problems, options.seconds))
    console = Console()
    for attempt in attempts:
        ended = outcomes(attempt)
        branches = f"{ended.count('ok')} of {len(ended)} branches in time" if ended else "no fork"
        solution = final_solution(attempt.trajectory).strip() or "no answer"
        verdict = "right" if attempt.correct else "not solved"
        console.print(f"{attempt.problem.text.strip()}: {solution} ({verdict}, {branches})", markup=False)
    console.print(render_summary({a.problem.text: a.trajectory for a in attempts}))
    longest = max(a.trajectory.wall_s for a in attempts)
    all_outcomes = [outcome for attempt in attempts for outcome in outcomes(attempt)]
    figures = {
        "ok": longest <= options.seconds + SLACK_S,
        "problems": len(attempts),
        "solved": sum(a.correct for a in attempts),
        "branches": len(all_outcomes),
        "in_time": all_outcomes.count("ok"),
        "seconds": options.seconds,
        "longest_s": round(longest, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
