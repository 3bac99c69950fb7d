"""Soak test of joins and groups in the KV cache: random forks, joins, groups of workers, aborts and evictions.

python -m benchmarks.kv_join.soak [--json] [--count 5000] [--seed 0] [--pool 1200] [--page-size 1]
    [--at-once 12] [--sample 300] [--log FILE]

The server checks its memory at every step and dies of a leak. Its log must contain no error, no token may be held when it
is idle, a join without its branches has to be a 409, and a linear prompt must not find what was joined or what workers of a
group have written. A sample of the answers and of the groups is compared with transformers. With pages of several tokens
the server runs no groups.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

import sgl_apr as apr
from benchmarks.kv_join.soak_groups import GROUP_OPERATIONS, LOGIT_TOLERANCE, PAGE_OPERATIONS, group_differs
from benchmarks.kv_join.soak_operations import (
    OPERATIONS,
    Answer,
    GroupAnswer,
    GroupEnded,
    NotCached,
    Soak,
    Violation,
    fork,
    prefix,
)
from sgl_apr.training.models import random_llama
from sgl_apr.trajectory.join_layout import extend_layout, layout_positions, masked_ranges
from tests.support.group_reference import load_reference

ENVIRONMENT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_TEST_RETRACT": "1",  # every so many steps, requests have to make room and restart
    "SGLANG_TEST_RETRACT_INTERVAL": "11",
}
LOG_ERROR = re.compile(r"Traceback|leak|invariant|AssertionError|CRITICAL", re.IGNORECASE)
RETRACTED = re.compile(r"#retracted_reqs: (\d+)")
WARMUP_OPERATIONS = 1000  # not counted, because prompts are still short


async def run_operation(soak: Soak, number: int, seed: int) -> None:
    """Run one random operation, and record its outcome."""
    rng = random.Random(f"{seed} {number}")
    operations = OPERATIONS | (PAGE_OPERATIONS if soak.has_pages else GROUP_OPERATIONS)
    (operation,) = rng.choices(list(operations), list(operations.values()))
    try:
        await operation(soak, rng)
        outcome = "done"
    except (NotCached, GroupEnded):
        outcome = "lost"
    except (Violation, TimeoutError, aiohttp.ClientError) as error:
        outcome = "wrong"
        soak.violations.append(f"{operation.__name__}: {error!r:.120}")
    soak.outcomes[f"{operation.__name__} {outcome}"] += 1


async def run(server: apr.Server, count: int, seed: int, at_once: int, *, has_pages: bool = False) -> Soak:
    """Run `count` operations after the warm-up, `at_once` in parallel."""
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        soak = Soak(session, server.url, has_pages=has_pages)
        for number in range(8):
            await prefix(soak, random.Random(f"{seed} first {number}"))
            await fork(soak, random.Random(f"{seed} first {number}"))

        async def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                if number * 5 // count == len(soak.marks):
                    soak.marks.append((number, time.perf_counter(), processor_seconds(server.pid)))
                await run_operation(soak, number, seed)

        for numbers in (iter(range(-WARMUP_OPERATIONS, 0)), iter(range(count))):
            soak.outcomes.clear()
            await asyncio.gather(*(work(numbers) for _ in range(at_once)))
        soak.marks.append((count, time.perf_counter(), processor_seconds(server.pid)))
    return soak


def processor_seconds(pid: int) -> float:
    """Processor seconds of a process and all its children; other load on the machine does not count."""
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


async def held_tokens(url: str, timeout: float = 30.0) -> int:
    """Tokens that are still held when nothing runs; waits up to `timeout` seconds for zero."""
    deadline = time.monotonic() + timeout
    async with await apr.HttpEngine.connect(url) as engine:
        while True:
            load = await engine.load()
            if (load.running, load.waiting, load.used_tokens) == (0, 0, 0) or time.monotonic() > deadline:
                return load.used_tokens + load.running + load.waiting
            await asyncio.sleep(0.2)


def differs(model: Any, answer: Answer) -> bool:
    """Whether a token is not the most likely one of a forward pass with an explicit mask and explicit positions."""
    import torch

    ids, new = [*answer.sequence.ids, *answer.ids], len(answer.ids)
    layout = extend_layout(answer.sequence.joined, len(ids)) or (len(ids),)
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for token, ranges in enumerate(masked_ranges(layout)):
        for first, last in ranges:
            visible[token, first:last] = False
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        logits = model(
            torch.tensor([ids]),
            attention_mask=mask,
            position_ids=torch.tensor([list(layout_positions(layout))]),
            use_cache=False,
        ).logits[0, -new - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    return bool((logits.max(dim=1).values - chosen > LOGIT_TOLERANCE).any())


def compare(directory: Path, answers: Sequence[Answer], sample: int, seed: int) -> tuple[int, int, int]:
    """Compare a sample of answers with transformers.

    Returns:
        The number of answers in the sample, how many of them follow joins, and how many differ.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    decoded = [a for a in answers if a.ids]
    chosen = random.Random(seed).sample(decoded, min(sample, len(decoded)))
    after_joins = sum(bool(a.sequence.joined) for a in chosen)
    return len(chosen), after_joins, sum(differs(model, a) for a in chosen)


def compare_groups(directory: Path, groups: Sequence[GroupAnswer], sample: int, seed: int) -> tuple[int, int]:
    """Compare a sample of groups of workers with transformers.

    Returns:
        The number of groups in the sample, and how many differ.
    """
    from transformers import AutoTokenizer

    model, tokenizer = load_reference(directory), AutoTokenizer.from_pretrained(directory)
    chosen = random.Random(seed).sample(groups, min(sample, len(groups)))
    return len(chosen), sum(group_differs(model, tokenizer, group) for group in chosen)


def ratio(count: float, total: float) -> float:
    """`count / total`, or 0 if `total` is 0, as after the server has died."""
    return count / total if total else 0.0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the soak on a server of its own; returns what the program prints."""
    with tempfile.TemporaryDirectory() as name:
        directory, log = Path(name), options.log or Path(name) / "log"
        random_llama(directory, seed=3)
        os.environ |= ENVIRONMENT
        flags = {
            "max_total_tokens": options.pool,
            "page_size": options.page_size,
            "context_length": 1024,
            "radix_cache_backend": "apr",
        }
        with apr.Server(directory, log_path=log, **flags) as server:
            soak = asyncio.run(
                run(server, options.count, options.seed, options.at_once, has_pages=options.page_size > 1)
            )
            try:
                tokens = asyncio.run(held_tokens(server.url))
            except apr.EngineError as error:
                tokens = -1
                soak.violations.append(f"at the end: {error}")
        log_text = log.read_text(errors="replace")
        total, after_joins, differ = compare(directory, soak.answers, options.sample, options.seed)
        groups, groups_differ = compare_groups(directory, soak.groups, options.sample, options.seed)
    errors = [line for line in log_text.splitlines() if LOG_ERROR.search(line)]
    steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(soak.marks)]
    walls, works = ([ratio(step[0], step[k]) for step in steps] for k in (1, 2))
    return {
        "ok": not (soak.violations or errors or tokens or differ or groups_differ),
        "operations": soak.outcomes.total(),
        "outcomes": dict(sorted(soak.outcomes.items())),
        "computed_tokens": soak.computed_tokens,
        "pool_tokens": options.pool,
        "page_size": options.page_size,
        "retractions": sum(int(n) for n in RETRACTED.findall(log_text)),
        "wrong": dict(Counter(soak.violations).most_common(10)),
        "violations": errors[:10],
        "held_when_idle": tokens,
        "compared": {"answers": total, "after_joins": after_joins, "differ": differ},
        "compared_groups": {"groups": groups, "differ": groups_differ},
        "per_second": [round(rate, 1) for rate in walls],
        "last_to_first": round(ratio(walls[-1], walls[0]), 3),
        "per_processor_second": [round(rate, 1) for rate in works],
        "last_to_first_per_processor_second": round(ratio(works[-1], works[0]), 3),
    }


def main() -> int:
    """Print a table, or JSON; status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--count", type=int, default=5000, help="operations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pool",
        type=int,
        default=1200,
        help="tokens in the KV cache, few enough for constant eviction (default: %(default)s)",
    )
    parser.add_argument(
        "--page-size", type=int, default=1, help="tokens of a page of the KV cache (default: %(default)s)"
    )
    parser.add_argument(
        "--at-once", type=int, default=12, help="operations in parallel (default: %(default)s)"
    )
    parser.add_argument(
        "--sample", type=int, default=300, help="answers to compare with transformers (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, help="a file for the log of the server")
    options = parser.parse_args()
    result = measure(options)
    if options.json:
        print(json.dumps(result))
    else:
        table = Table("figure", "value", title="soak")
        for name, value in result.items():
            rows = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
            table.add_row(name, "\n".join(rows))
        Console().print(table)
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
