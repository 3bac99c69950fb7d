"""Agents in branches: workers that share one long document, each with a search tool of its own, and a merged report.

python examples/agents.py [--model smollm2] [--tokens 1500]
python examples/agents.py --url URL [--tokens 20000]

The document is a log book with one chapter for each worker. A worker searches its chapter, and writes what it has found.
The merge reads what all of them wrote. The same tasks then run one after another, to see what running at once gains.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table
from serving import example_parser, served

import sgl_apr as apr
from sgl_apr.views.tree import render_tree

STATIONS = ("North Ridge", "Mill Creek", "Stone Bay", "Old Harbour")
WORK = (
    "measured the wind",
    "repaired the mast",
    "counted the birds",
    "cleaned the sensor",
    "checked the battery",
)
FINDINGS = ("nothing unusual", "a loose cable", "ice on the ladder", "a cracked window", "low voltage")
DEFAULT_PARSER = "hermes"  # for a server that does not say how its model writes calls
TASK_TOKENS, MERGE_TOKENS = 216, 64  # what tools return counts as well
LINE_TOKENS = 20  # of one entry of the log book, about


def chapters(tokens: int) -> dict[str, list[str]]:
    """A log book of about so many tokens: the entries of each station."""
    days = max(2, tokens // (LINE_TOKENS * len(STATIONS)))
    return {
        station: [
            f"Day {day}, {station}: the crew {WORK[(day + k) % 5]} and found {FINDINGS[(3 * day + k) % 5]}."
            for day in range(1, days + 1)
        ]
        for k, station in enumerate(STATIONS)
    }


def search_tool(entries: list[str]) -> Callable[..., str]:
    """A tool that searches the entries of one chapter."""

    def search(query: Annotated[str, Field(min_length=1, max_length=24)]) -> str:
        """Search the entries of your station.

        Args:
            query: A word, such as "cable" or "mast".
        """
        found = [entry for entry in entries if query.strip().lower() in entry.lower()]
        return "\n".join(found[:2]) or f"No entry has {query!r}. The last one is: {entries[-1]}"

    return search


def make_tasks(book: dict[str, list[str]]) -> list[apr.ForkTask]:
    """A task for each station. It has to search before it answers."""
    return [
        apr.ForkTask(
            f"You look after {station}. Search its entries once, then say in one sentence what needs repair.",
            name=station,
            tools=[search_tool(entries)],
            tool_choice="required",
            budget={"tool_calls": 1, "tool_seconds": 10},
            max_tokens=TASK_TOKENS,
        )
        for station, entries in book.items()
    ]


async def run(url: str, book: dict[str, list[str]]) -> tuple[apr.ForkResult, float, float]:
    """Run all workers at once, and the same ones one after another.

    Returns:
        The result of all at once, its seconds without the merge, and the seconds of one after another.
    """
    document = "\n\n".join("\n".join(entries) for entries in book.values())
    messages = [{"role": "user", "content": f"This is our log book.\n\n{document}"}]
    tasks = make_tasks(book)
    options: dict[str, Any] = {"temperature": 0.7, "seed": 0}
    async with await apr.HttpEngine.connect(url, timeout=600) as engine:
        options["tool_call_parser"] = engine.tool_call_parser or DEFAULT_PARSER
        # The conversation is warm before anything is measured, as it is after an earlier turn.
        await apr.fork(
            engine, messages, [apr.ForkTask("Are you ready?", max_tokens=1)], tools=tasks[0].tools, **options
        )
        started = time.monotonic()
        for task in tasks:
            await apr.fork(engine, messages, [task], **options)
        serial_s = time.monotonic() - started
        started = time.monotonic()
        merge = apr.Merge("Write a report of one sentence for each station.", max_tokens=MERGE_TOKENS)
        budget = {"tokens": 2 * len(tasks) * TASK_TOKENS}
        result = await apr.fork(engine, messages, tasks, merge, budget=budget, **options)
        return result, time.monotonic() - started - merge_seconds(result), serial_s


def merge_seconds(result: apr.ForkResult) -> float:
    """How long the merge took."""
    ends = [call.ended for call in result.trajectory.calls if call.path]
    return result.trajectory.wall_s - max(ends)


def show(result: apr.ForkResult, console: Console) -> None:
    """Print the tree, and a row for each worker."""
    console.print(render_tree(result.trajectory, "log book"))
    table = Table("worker", "searched for", "outcome", "cached", "answer")
    for worker in result.results:
        share = (worker.usage.cached_tokens or 0) / max(1, worker.usage.prompt_tokens)
        calls = ", ".join(call.arguments for call in worker.tool_calls)
        table.add_row(worker.name, calls, worker.outcome, f"{share:.1%}", worker.text.strip()[:120])
    console.print(table, markup=False)
    console.print(f"merged: {(result.merged or '').strip()}", markup=False)


def main() -> None:
    """Run the workers, show what they did, and print one JSON object last."""
    parser = example_parser(__doc__, "smollm2")
    parser.add_argument(
        "--tokens", type=int, default=1500, help="length of the document, about (default: %(default)s)"
    )
    options = parser.parse_args()
    flags: dict[str, Any] = {"max_total_tokens": 16384 + 2 * options.tokens}
    with served(options, **flags) as url:
        result, wall_s, serial_s = asyncio.run(run(url, chapters(options.tokens)))
    console = Console()
    show(result, console)
    console.print(
        f"{len(result.results)} workers took {wall_s:.1f} s at once and {serial_s:.1f} s one after another. They share "
        f"{result.shared_tokens} tokens, of which each found {result.min_cached_share:.1%} or more in the cache."
    )
    calls = result.trajectory.tool_calls
    figures = {
        "ok": result.min_cached_share == 1 and len(calls) == len(STATIONS) and bool(result.merged),
        "workers": len(result.results),
        "shared_tokens": result.shared_tokens,
        "min_cached_share": round(result.min_cached_share, 4),
        "tool_calls": len(calls),
        "tools_ok": sum(call.outcome == "ok" for call in calls),
        "wall_s": round(wall_s, 2),
        "serial_wall_s": round(serial_s, 2),
        "gain": round(serial_s / wall_s, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
