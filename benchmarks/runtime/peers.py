"""Wall time of the runtime relative to a plain thread-pool orchestrator, on one server of SmolLM2, greedy, with grammars.

The orchestrator has the usual shape of such a client: a thread for each question, one blocking request for each phase
through the `openai` package, a thread pool for the branches, prompts as text, nothing streamed and nothing committed.
Both clients send the same grammars, token limits and stop tokens, and start with empty caches.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.checks import finish
from benchmarks.common.machine import hardware, versions
from benchmarks.runtime.thread_pool import DIALECT, Reply, ThreadPoolOrchestrator, make_plan
from sgl_apr.training.models import smollm2

BARS = {"reply_ratio": 1.0}  # upper limits
WIDTH = 3
BUDGET = apr.Budget(tokens=360, width=WIDTH, branch_tokens=40, outline_chars=24)
OPTIONS: dict[str, Any] = {
    "budget": BUDGET, "mode": "parallel", "max_blocks": 1, "min_width": WIDTH, "temperature": 0,
}  # fmt: skip
QUESTIONS = (
    "Why do people keep dogs?",
    "How can I learn to cook?",
    "What makes a good friend?",
    "Why is the sea salty?",
    "How do I plan a garden?",
    "Why do we sleep?",
    "How can a town save water?",
    "What do trees need?",
    "How do I prepare for an exam?",
    "Why do birds migrate?",
    "How can I write a good letter?",
    "What makes a city pleasant?",
    "Why do we need museums?",
    "How can I save money?",
    "What makes bread rise?",
    "How do I train for a long run?",
)
EXAMPLES = """examples:
  python -m benchmarks.runtime.peers --json --check
  python -m benchmarks.runtime.peers --rounds 2 --questions 10
  python -m benchmarks.runtime.peers --url http://127.0.0.1:30000    # a server on this machine, with --enable-cache-report"""


def prompt(question: str) -> str:
    """A question in the model's chat template."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def from_trajectory(trajectory: apr.Trajectory) -> Reply:
    """The reply of a trajectory. Its commits are requests too."""
    calls = sorted(trajectory.calls, key=lambda c: c.path)
    ends = {
        name: max((c.ended for c in calls if c.phase == name), default=0.0) for name in ("trunk", "branch")
    }
    return Reply(
        trajectory.text,
        trajectory.wall_s,
        (ends["trunk"], ends["branch"] - ends["trunk"], trajectory.wall_s - ends["branch"]),
        tuple(c.output_tokens for phase in ("trunk", "branch", "after") for c in calls if c.phase == phase),
        sum(1 + c.retries + c.continuations for c in calls),
        sum(c.prompt_tokens for c in calls),
        sum(c.cached_tokens or 0 for c in calls),
    )


class Runtime:
    """Makes replies with `apr.arun_many`, in an event loop that is open for as long as this is."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.Runner()
        self.engine = self._loop.run(apr.HttpEngine.connect(url, timeout=1200))

    def close(self) -> None:
        """Close its connections."""
        self._loop.run(self.engine.close())
        self._loop.close()

    def run(self, prompts: Sequence[str]) -> list[Reply]:
        """Reply to all prompts at once."""
        problems = {f"{i:03}": text for i, text in enumerate(prompts)}
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "trajectories.jsonl"
            self._loop.run(apr.arun_many(self.engine, problems, path, DIALECT, **OPTIONS))
            return [from_trajectory(trajectory) for _, trajectory in sorted(apr.read_many(path))]


def flush(url: str) -> None:
    """Empty the server's caches."""
    with urlopen(HttpRequest(f"{url}/flush_cache?timeout=30", method="POST"), timeout=60):
        pass


def server_process(url: str) -> psutil.Process:
    """The process on this machine that listens at the port of a URL."""
    port = urlsplit(url).port
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise SystemExit(f"{url} is not served by a process of this machine")


def cpu_seconds(server: psutil.Process) -> dict[str, float]:
    """CPU seconds of this process and of the server's, by kind."""
    seconds: dict[str, float] = defaultdict(float, client=time.process_time())
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            kinds = [kind for kind in ("scheduler", "detokenizer") if kind in title]
            times = process.cpu_times()
            seconds[kinds[0] if kinds else "http"] += times.user + times.system
    return seconds


def measure(
    client: Runtime | ThreadPoolOrchestrator, prompts: Sequence[str], server: psutil.Process
) -> Measured:
    """Run a client once and measure it."""
    before, started = cpu_seconds(server), time.perf_counter()
    replies = client.run(prompts)
    seconds, after = time.perf_counter() - started, cpu_seconds(server)
    return Measured(replies, seconds, {name: after[name] - before[name] for name in after})


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a client.

    Attributes:
        replies: Its replies, in the order of the prompts.
        wall_s: Seconds until the last one ended.
        cpu_s: CPU seconds by process.
    """

    replies: Sequence[Reply]
    wall_s: float
    cpu_s: Mapping[str, float]

    def figures(self) -> dict[str, Any]:
        """What the benchmark prints of the run."""
        phases = zip(*(r.phases for r in self.replies if len(r.phases) == 3), strict=True)
        return {
            "wall_s": round(self.wall_s, 2),
            "phases_s": [round(statistics.mean(seconds), 2) for seconds in phases],
            "cpu_s": {name: round(seconds, 2) for name, seconds in self.cpu_s.items()},
            "valid": sum(r.is_valid for r in self.replies),
            "prefilled_tokens": sum(r.prompt_tokens - r.cached_tokens for r in self.replies),
            "cached_tokens": sum(r.cached_tokens for r in self.replies),
            "decoded_tokens": sum(sum(r.decoded) for r in self.replies),
            "requests": sum(r.requests for r in self.replies),
        }


def compare(runtime: Measured, pool: Measured) -> dict[str, Any]:
    """Compare two runs on the same prompts.

    Returns:
        `wall_ratio`: the wall time of the runtime's run relative to the other. `reply_ratio`: the same for the replies
        that both have finished with the same number of tokens, each from its own start to its own end.
    """
    pairs = list(zip(runtime.replies, pool.replies, strict=True))
    both = [(a, b) for a, b in pairs if a.decoded == b.decoded and a.is_valid and b.is_valid]
    seconds = [sum(r.wall_s for r in replies) for replies in zip(*both, strict=True)]
    return {
        "wall_ratio": round(runtime.wall_s / pool.wall_s, 3),
        "reply_ratio": round(seconds[0] / seconds[1], 3) if both else None,
        "compared": len(both),
        "same_text": sum(a.text == b.text for a, b in pairs),
    }


def run_rounds(
    url: str, server: psutil.Process, questions: int, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """Run both clients in turn, each first in every other round."""
    prompts = [prompt(question) for question in QUESTIONS[:questions]]
    runtime = Runtime(url)
    pool = ThreadPoolOrchestrator(url, asyncio.run(make_plan(runtime.engine.tokenizer, OPTIONS)), questions)
    clients: dict[str, Runtime | ThreadPoolOrchestrator] = {"runtime": runtime, "thread_pool": pool}
    results = list[dict[str, Any]]()
    try:
        for client in clients.values():
            client.run(prompts[:1])  # warms up
        for i in track(range(rounds), "rounds", console=console):
            runs = dict[str, Measured]()
            for name in list(clients)[:: -1 if i % 2 else 1]:
                flush(url)
                runs[name] = measure(clients[name], prompts, server)
            figures = {name: runs[name].figures() for name in clients}
            results.append(
                {"first": next(iter(runs)), **compare(*(runs[name] for name in clients)), **figures}
            )
            console.print(json.dumps(results[-1]), highlight=False, soft_wrap=True)
    finally:
        pool.close()
        runtime.close()
    return results


def summarize(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians over all rounds."""

    def median(name: str) -> float | None:
        values = [r[name] for r in rounds if r[name] is not None]
        return round(statistics.median(values), 3) if values else None

    return {name: median(name) for name in ("reply_ratio", "wall_ratio", "compared", "same_text")}


@contextlib.contextmanager
def served(url: str | None) -> Iterator[tuple[str, psutil.Process]]:
    """The server at `url`, or one of SmolLM2 with the tags as tokens."""
    if url is not None:
        yield url, server_process(url)
        return
    model = smollm2(DIALECT.tags, label=DIALECT.name)
    with apr.Server(model, max_total_tokens=16384, context_length=2048, enable_cache_report=True) as server:
        yield server.url, psutil.Process(server.pid)


def missed(results: Mapping[str, Any]) -> list[str]:
    """The bars that are missed, one sentence each."""
    over = [f"{name} {results[name]} > {bar}" for name, bar in BARS.items() if (results[name] or 0) > bar]
    return over if results["compared"] else ["no reply has as many tokens from both clients"]


def show(results: dict[str, Any]) -> None:
    table = Table(
        "round", "first", "ratio of replies", "of walls", "runtime", "thread pool", title="Wall time"
    )
    for i, r in enumerate(results["rounds"], 1):
        walls = (f"{r[name]['wall_s']} s" for name in ("runtime", "thread_pool"))
        table.add_row(str(i), r["first"], str(r["reply_ratio"]), str(r["wall_ratio"]), *walls)
    table.add_row("median", "", str(results["reply_ratio"]), str(results["wall_ratio"]))
    Console(width=120).print(table)


def main() -> int:
    """Print a table, or JSON; with --check, status 1 if a bar is missed."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=kind)
    add = parser.add_argument
    add("--rounds", type=int, default=4, help="how often both clients run (default: %(default)s)")
    add(
        "--questions", type=int, default=12, choices=range(1, len(QUESTIONS) + 1), metavar="N",
        help=f"how many run at once, at most {len(QUESTIONS)} (default: %(default)s)",
    )  # fmt: skip
    add("--url", help="a running server on this machine (default: start one)")
    add("--json", action="store_true", help="one JSON object on stdout instead of a table")
    add("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    with served(options.url) as (url, server):
        rounds = run_rounds(url, server, options.questions, options.rounds, Console(stderr=True))
    results = {
        "model": "SmolLM2-135M-Instruct",
        "questions": options.questions,
        "branches": WIDTH,
        **summarize(rounds),
        "rounds": rounds,
        "hardware": hardware(),
        "versions": versions("sgl-apr", "sglang", "torch", "openai"),
    }
    return finish(results, missed(results), show, options)


if __name__ == "__main__":
    sys.exit(main())
