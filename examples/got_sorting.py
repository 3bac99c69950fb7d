"""Graph of Thoughts on sorting and on the intersection of sets: halves, each the best of several tries, then all.

python examples/got_sorting.py [--model smollm2] [--size 8] [--count 2]
python examples/got_sorting.py --url URL

Errors are counted, not guessed. A small model makes some, and the last line says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import ExitStack

from rich.console import Console
from rich.progress import track

import sgl_apr as apr
from sgl_apr.evaluation.tasks.lists import ListProblem, ListTask, generate_problems
from sgl_apr.methods.graph_of_thoughts import graph_of_thoughts
from sgl_apr.methods.registry import MethodResult
from sgl_apr.training.models import locate_model, smollm2
from sgl_apr.views.tree import render_summary


async def solve(url: str, given: list[ListProblem]) -> list[MethodResult]:
    """One problem after another; operations of one that are ready run at once."""
    found, budget = list[MethodResult](), apr.Budget(tokens=16000)
    async with await apr.HttpEngine.connect(url) as engine:
        task = ListTask(engine)
        for lists in track(given, "lists", console=Console(stderr=True)):
            found.append(await graph_of_thoughts(engine, lists, task=task, budget=budget))
    return found


def main() -> None:
    """Ask, show what came of it, and print one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="smollm2", help="a checkpoint, served for the time being")
    which.add_argument("--url", help="a running server")
    parser.add_argument("--size", type=int, default=8, help="numbers in a list")
    parser.add_argument("--count", type=int, default=2, help="lists of each kind")
    options = parser.parse_args()
    given = [p for kind in ("sort", "intersect") for p in generate_problems(kind, options.count, size=options.size)]
    with ExitStack() as stack:
        url = options.url
        if url is None:
            model = smollm2() if options.model == "smollm2" else locate_model(options.model)
            url = stack.enter_context(apr.Server(model, max_total_tokens=16384)).url
        found = asyncio.run(solve(url, given))
    errors = [p.count_errors(json.loads(r.answer or "[]")) for p, r in zip(given, found, strict=True)]
    console = Console(width=125)
    for lists, result, wrong in zip(given, found, errors, strict=True):
        console.print(f"{lists.text}\n  {result.answer or '-'}  {wrong} errors", markup=False)
    console.print(render_summary({p.text: r.trajectory for p, r in zip(given, found, strict=True)}))
    figures = {
        "ok": not any(errors),
        "lists": len(given),
        "right": errors.count(0),
        "errors": sum(errors),
        "total_tokens": sum(r.metrics.total for r in found),
        "critical_path": sum(r.metrics.critical_path for r in found),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
