"""One word chooses how a model thinks in parallel: the same call for one that forks by itself, and for one that does not.

python examples/pro.py                     # Countdown: the model that comes with the package decides when to fork
python examples/pro.py --model smollm2     # a question: the model writes several replies, and makes one of them
python examples/pro.py --url URL --question "Why is the sky blue?"

The label says what was chosen, and why. `--tokens` and `--seconds` are the budget that it is chosen by.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from rich.console import Console
from serving import example_parser, served

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.problems import Problem
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods import MethodResult, method
from sgl_apr.views.tree import render_tree


async def solve(url: str, question: str | None, budget: dict[str, Any]) -> MethodResult:
    """Answer a question; without one, solve a Countdown problem."""
    async with await apr.HttpEngine.connect(url) as engine:
        if question:
            return await method("pro")(engine, question, task=QuestionTask(engine), budget=budget)
        problem = Problem.parse(" 39: 6 12 18 23")
        return await method("pro")(engine, problem, task=CountdownTask(engine), budget=budget, temperature=0)


def main() -> None:
    """Show the trajectory, what was chosen, and one JSON object last."""
    parser = example_parser(__doc__, "builtin")
    parser.add_argument(
        "--question", help="by default a Countdown problem, or with smollm2 one about the sky"
    )
    parser.add_argument("--tokens", type=int, default=6000, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="default: no deadline")
    options = parser.parse_args()
    question = options.question or ("Why is the sky blue?" if options.model == "smollm2" else None)
    budget = {"tokens": options.tokens} | ({"seconds": options.seconds} if options.seconds else {})
    with served(options) as url:
        result = asyncio.run(solve(url, question, budget))
    console = Console()
    console.print(render_tree(result.trajectory, question or "make 39 of 6, 12, 18, 23"))
    console.print("chose", result.label, markup=False)
    figures = {"branches": result.metrics.branches, "critical_path": result.metrics.critical_path}
    print(json.dumps({"ok": bool(result.answer), "answer": result.answer, "label": result.label} | figures))


if __name__ == "__main__":
    main()
