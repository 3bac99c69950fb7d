"""Tree of Thoughts on the Game of 24: make 24 of four cards, with the model that comes with the package.

python examples/tot_game24.py [--count 5] [--search bfs|dfs]
python examples/tot_game24.py --url URL

The model proposes steps and judges them by searches of its own. Answers are checked exactly.
"""

from __future__ import annotations

import asyncio
import json
from itertools import islice
from typing import Literal

from rich.console import Console
from rich.progress import track
from serving import example_parser, served

import sgl_apr as apr
from sgl_apr.evaluation.benchmarks.games import game24_problems
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.evaluation.tasks.countdown.problems import Problem, solves
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.tree_of_thoughts import tree_of_thoughts
from sgl_apr.views.tree import render_summary


async def play(url: str, games: list[Problem], search: Literal["bfs", "dfs"]) -> list[MethodResult]:
    """Play one game after another; the states of a level are expanded in parallel."""
    results, budget = list[MethodResult](), apr.Budget(tokens=6000)
    async with await apr.HttpEngine.connect(url) as engine:
        task = CountdownTask(engine)
        for game in track(games, "games", console=Console(stderr=True)):
            results.append(await tree_of_thoughts(engine, game, task=task, search=search, budget=budget))
    return results


def main() -> None:
    """Play the games, show the answers, and print one JSON object last."""
    parser = example_parser(__doc__, "builtin")
    parser.add_argument("--count", type=int, default=5, help="number of games (default: %(default)s)")
    parser.add_argument("--search", choices=["bfs", "dfs"], default="bfs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    games = list(islice(game24_problems(options.seed), options.count))
    with served(options, **SERVER_OPTIONS) as url:
        results = asyncio.run(play(url, games, options.search))
    console = Console()
    correct = [solves(game, result.answer) for game, result in zip(games, results, strict=True)]
    for game, result, right in zip(games, results, correct, strict=True):
        verdict = "right" if right else "wrong"
        console.print(f"{game.text.strip()}  {result.answer or '-'}  {verdict}", markup=False)
    console.print(render_summary({g.text: r.trajectory for g, r in zip(games, results, strict=True)}))
    figures = {
        "games": len(games),
        "solved": sum(correct),
        "search": options.search,
        "total_tokens": sum(r.metrics.total for r in results),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
