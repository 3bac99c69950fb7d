"""Countdown problems for a model that has learned when to fork, and the trees that it chose.

python examples/countdown.py [--model runs/rl/model] [--count 6] [--seed 0]     # docs/countdown.md: how to train one
python examples/countdown.py --url URL
"""

from __future__ import annotations

import asyncio
import json

from rich.console import Console
from serving import example_parser, served

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS, Attempt, attempt_problems
from sgl_apr.evaluation.tasks.countdown.problems import Problem, generate_problems
from sgl_apr.views.tree import render_summary, render_tree


async def solve(url: str, problems: list[Problem]) -> list[Attempt]:
    """Solve all problems in parallel, greedily; the model decides whether to fork, and into how many branches."""
    budget = apr.Budget(tokens=6000, width=16, branch_tokens=160)
    async with await apr.HttpEngine.connect(url) as engine:
        return await attempt_problems(engine, problems, None, budget=budget, temperature=0.0)


def main() -> None:
    """Solve the problems, show the trees, and print one JSON object last."""
    parser = example_parser(__doc__, "builtin")
    parser.add_argument("--count", type=int, default=6, help="number of problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with served(options, **SERVER_OPTIONS) as url:
        problems = list(generate_problems(options.count, "test", seed=options.seed))
        attempts = asyncio.run(solve(url, problems))
    console = Console()
    for attempt in attempts:
        problem, outcome = attempt.problem, "solved" if attempt.correct else "not solved"
        title = f"make {problem.target} of {problem.numbers}: {outcome}"
        console.print(render_tree(attempt.trajectory, title))
    console.print(render_summary({a.problem.text: a.trajectory for a in attempts}))
    metrics = [a.trajectory.metrics() for a in attempts]
    joins = [join for a in attempts for join in a.trajectory.joins]
    shares = [
        call.cached_tokens / call.shared_tokens
        for a in attempts
        for call in a.trajectory.calls
        if call.phase == "branch" and call.cached_tokens is not None and call.shared_tokens
    ]
    figures = {
        "ok": all(apr.dialect(a.trajectory.dialect).is_valid(a.trajectory.text) for a in attempts),
        "problems": len(attempts),
        "solved": sum(a.correct for a in attempts),
        "forked": sum(m.blocks > 0 for m in metrics),
        "branches": sum(m.branches for m in metrics),
        "total_tokens": sum(m.total for m in metrics),
        "critical_path": sum(m.critical_path for m in metrics),
        "cached_share": min([1.0, *shares]),  # of the prefix that a branch shares with its trunk, the lowest
        "kv_joins": sum(join.by == "kv" for join in joins),
        "text_joins": sum(join.by == "text" for join in joins),  # because the cache could not hold a join
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
