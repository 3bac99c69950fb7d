"""Tree of Thoughts on the Game of 24: make 24 of four cards, with the model that comes with the package.

python examples/tot_game24.py [--count 5] [--search bfs|dfs] [--url URL]

The steps are proposed by the model, and judged by sub searches of its own; what it answers is checked exactly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import ExitStack
from itertools import islice

from rich.console import Console
from rich.progress import track

import sgl_apr as apr
from sgl_apr.evaluation.benchmarks.games import game24_problems
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.evaluation.tasks.countdown.problems import Problem, solves
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.tree_of_thoughts import tree_of_thoughts
from sgl_apr.training.models import locate_model
from sgl_apr.views.tree import render_summary


async def play(url: str, given: list[Problem], search: str) -> list[MethodResult]:
    """One game after another; what belongs to one is thought at once."""
    found = list[MethodResult]()
    async with await apr.HttpEngine.connect(url) as engine:
        task = CountdownTask(engine)
        for game in track(given, "games", console=Console(stderr=True)):
            budget = apr.Budget(tokens=6000)
            found.append(await tree_of_thoughts(engine, game, task=task, search=search, budget=budget))
    return found


def main() -> None:
    """Play, show the answers and the figures, and print one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="builtin", help="a checkpoint, served for the time being")
    which.add_argument("--url", help="a running server")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--search", choices=["bfs", "dfs"], default="bfs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    given, console = list(islice(game24_problems(options.seed), options.count)), Console(width=125)
    with ExitStack() as stack:
        url = options.url or stack.enter_context(apr.Server(locate_model(options.model), **SERVER_OPTIONS)).url
        found = asyncio.run(play(url, given, options.search))
    solved = 0
    for game, result in zip(given, found, strict=True):
        right = solves(game, result.answer)
        solved += right
        console.print(
            f"{game.text.strip()}  {result.answer or '-'}  {'right' if right else 'wrong'}", markup=False
        )
    console.print(render_summary({g.text: r.trajectory for g, r in zip(given, found, strict=True)}))
    tokens = sum(r.metrics.total for r in found)
    print(
        json.dumps({"games": len(given), "solved": solved, "search": options.search, "total_tokens": tokens})
    )


if __name__ == "__main__":
    main()
