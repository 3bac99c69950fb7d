"""Graph of Thoughts on sorting and on the intersection of sets: solve each half several times, then merge the best.

python examples/got_sorting.py [--model smollm2] [--size 8] [--count 2]
python examples/got_sorting.py --url URL

Errors are counted exactly. A small model makes some; the last line says how many.
"""

from __future__ import annotations

import asyncio
import json

from rich.console import Console
from rich.progress import track
from serving import example_parser, served

import sgl_apr as apr
from sgl_apr.evaluation.tasks.lists import ListKind, ListProblem, ListTask, generate_problems
from sgl_apr.methods.graph_of_thoughts import graph_of_thoughts
from sgl_apr.methods.registry import MethodResult
from sgl_apr.views.tree import render_summary


async def solve(url: str, problems: list[ListProblem]) -> list[MethodResult]:
    """Solve one problem after another; independent operations of a problem run in parallel."""
    results, budget = list[MethodResult](), apr.Budget(tokens=16000)
    async with await apr.HttpEngine.connect(url) as engine:
        task = ListTask(engine)
        for problem in track(problems, "lists", console=Console(stderr=True)):
            results.append(await graph_of_thoughts(engine, problem, task=task, budget=budget))
    return results


def main() -> None:
    """Solve the problems, show the answers, and print one JSON object last."""
    parser = example_parser(__doc__, "smollm2")
    parser.add_argument("--size", type=int, default=8, help="numbers in a list (default: %(default)s)")
    parser.add_argument("--count", type=int, default=2, help="lists of each kind (default: %(default)s)")
    options = parser.parse_args()
    kinds: tuple[ListKind, ...] = ("sort", "intersect")
    problems = [
        problem for kind in kinds for problem in generate_problems(kind, options.count, size=options.size)
    ]
    with served(options, max_total_tokens=16384) as url:
        results = asyncio.run(solve(url, problems))
    errors = [p.count_errors(json.loads(r.answer or "[]")) for p, r in zip(problems, results, strict=True)]
    console = Console()
    for problem, result, count in zip(problems, results, errors, strict=True):
        console.print(f"{problem.text}\n  {result.answer or '-'}  {count} errors", markup=False)
    console.print(render_summary({p.text: r.trajectory for p, r in zip(problems, results, strict=True)}))
    figures = {
        "ok": not any(errors),
        "lists": len(problems),
        "right": errors.count(0),
        "errors": sum(errors),
        "total_tokens": sum(r.metrics.total for r in results),
        "critical_path": sum(r.metrics.critical_path for r in results),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
