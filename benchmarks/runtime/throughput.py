"""Throughput of many trajectories that decode freely, and what they cost each process."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import sgl_apr as apr
from benchmarks.common.processes import cpu_spent, peak_rss_mb

MAX_REPEATED = 128  # trajectories of a level that runs more than it has at once


async def throughput(
    server: apr.Server, concurrency: int, dialect: apr.Dialect, **options: Any
) -> dict[str, Any]:
    """Run trajectories with `run_many`, and measure tokens per second and CPU seconds.

    Args:
        server: The server.
        concurrency: How many may run at once.
        dialect: The format.
        options: Of each trajectory.

    Returns:
        `wall_s` is the shortest, the median and the longest; `mean_parallel` how many ran at once on average;
        `cached_share` the part of all prompt tokens that was cached; `peak_rss_mb` that of the client so far.
    """
    # Few trajectories run four times, so that each level takes long enough to measure.
    count = max(concurrency, min(4 * concurrency, MAX_REPEATED))
    problems = {str(i): f"Question {i}: " for i in range(count)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trajectories.jsonl"
        async with await apr.HttpEngine.connect(server.url, timeout=600) as engine:
            with cpu_spent(server.pid) as cpu_s:
                started = time.perf_counter()
                await apr.arun_many(engine, problems, path, dialect, concurrency=concurrency, **options)
                seconds = time.perf_counter() - started
            peak = peak_rss_mb()
        results = [trajectory for _, trajectory in apr.read_many(path)]
    walls, calls = [t.wall_s for t in results], [call for t in results for call in t.calls]
    prompts = sum(call.prompt_tokens for call in calls)
    return {
        "trajectories": len(problems),
        "valid": sum(dialect.is_valid(t.text) and bool(t.blocks) for t in results),
        "requests": len(calls),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(call.output_tokens for call in calls) / seconds, 1),
        "trajectories_per_s": round(len(results) / seconds, 2),
        "mean_parallel": round(sum(walls) / seconds, 1),
        "cached_share": round(sum(call.cached_tokens or 0 for call in calls) / prompts, 3),
        "wall_s": [round(s, 2) for s in (min(walls), statistics.median(walls), max(walls))],
        "cpu_s": cpu_s,
        "peak_rss_mb": peak,
    }
