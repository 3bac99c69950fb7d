"""How many replies of SmolLM2 fork and follow the dialect, with the grammar on and off, with both kinds of tags."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from rich.console import Console
from rich.progress import track
from rich.table import Table

import sgl_apr as apr
from sgl_apr.training.models import smollm2

DIALECT = apr.dialect("threadweaver")
EXAMPLE = (
    "<Parallel>\n<Outlines>\n<Outline>1: company</Outline>\n<Outline>2: work</Outline>\n</Outlines>\n"
    "<Thread>\n1: A cat is warm and quiet.\n</Thread><Thread>\n2: Cats catch mice.\n</Thread>\n"
    "<Conclusion>Good company, and useful.</Conclusion>\n</Parallel>\nCats are good company and catch mice."
)
SUBJECTS = ["dogs", "trees", "books", "bread", "rain", "music", "bridges", "salt", "games", "boats"]


def prompt(subject: str) -> str:
    """A worked example, then the question."""
    return (
        f"<|im_start|>user\nWhy do people keep cats?<|im_end|>\n<|im_start|>assistant\n{EXAMPLE}<|im_end|>\n"
        f"<|im_start|>user\nWhy do people need {subject}?<|im_end|>\n<|im_start|>assistant\n"
    )


async def replies(url: str, count: int, constrain: bool) -> list[apr.Trajectory]:
    """`count` replies at temperature 1, four in parallel."""
    budget = apr.Budget(tokens=240, width=3, branch_tokens=32)
    async with await apr.HttpEngine.connect(url) as engine:
        semaphore = asyncio.Semaphore(4)

        async def one(i: int) -> apr.Trajectory:
            async with semaphore:
                text = prompt(SUBJECTS[i % len(SUBJECTS)])
                return await apr.areason(
                    engine,
                    text,
                    budget=budget,
                    mode="parallel",  # which only the grammar can enforce
                    max_blocks=1,
                    constrain=constrain,
                    temperature=1.0,
                )

        tasks = [asyncio.create_task(one(i)) for i in range(count)]
        name = "grammar on" if constrain else "grammar off"
        return [await t for t in track(tasks, name, console=Console(stderr=True))]


def measure(tags: bool, count: int) -> list[dict[str, object]]:
    """Count replies of a model with tags as tokens or spelled out, with the grammar and without it."""
    model = smollm2(DIALECT.tags, label=DIALECT.name) if tags else smollm2()
    rows: list[dict[str, object]] = []
    with apr.Server(model, max_total_tokens=16384) as server:
        for constrain in (True, False):
            trajectories = asyncio.run(replies(server.url, count, constrain))
            metrics = [t.metrics() for t in trajectories]
            rows.append(
                {
                    "tags": "tokens" if tags else "text",
                    "grammar": constrain,
                    "replies": count,
                    "valid": sum(DIALECT.is_valid(t.text) for t in trajectories),
                    "valid_and_forked": sum(
                        DIALECT.is_valid(t.text) and bool(t.blocks) for t in trajectories
                    ),
                    "closers_decoded": sum(m.closers_decoded for m in metrics),
                    "closers_injected": sum(m.closers_injected for m in metrics),
                }
            )
    return rows


def main() -> int:
    """Print a table, or JSON; status 1 if a reply under the grammar is not valid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=30, help="replies of each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    options = parser.parse_args()
    rows = [row for tags in (True, False) for row in measure(tags, options.count)]
    if options.json:
        print(json.dumps({"model": "SmolLM2-135M-Instruct", "temperature": 1.0, "rows": rows}))
    else:
        table = Table(*rows[0], title="SmolLM2-135M-Instruct at temperature 1.0")
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table)
    return int(any(row["grammar"] and row["valid"] != row["replies"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
