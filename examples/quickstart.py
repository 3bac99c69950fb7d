"""Three questions to a small model that forks its own reasoning: python examples/quickstart.py --url URL."""

from __future__ import annotations

import argparse
import asyncio
import json

import sglang as sgl
from rich.console import Console
from rich.progress import track

import sgl_apr as apr
from sgl_apr.report.tree import summary, tree
from sgl_apr.runtime.replay import Replay, replay_serially

QUESTIONS = [
    "Tell me about whales, eagles and elephants.",
    "What do a doctor, a teacher and a farmer do?",
    "What are the spring, the summer and the winter like?",
]

# A model of 135M parameters has never seen the format: two worked examples show it.
EXAMPLES = {
    "What are a hammer, a saw and a ladder for?": (
        [
            ("A hammer", "drives nails into wood. It has a heavy metal head and a long handle."),
            ("A saw", "cuts wood and metal. It has a thin blade with sharp teeth."),
            ("A ladder", "helps people climb to high places. It has two rails and many steps."),
        ],
        "Each tool has its own work.",
        "A hammer drives nails, a saw cuts wood, and a ladder takes you up high.",
    ),
    "Tell me about the moon and the sun.": (
        [
            ("The moon", "goes around the Earth once a month. It is made of rock and has no air."),
            ("The sun", "is a star made of hot gas. It gives the Earth light and heat."),
        ],
        "One is rock and one is a star.",
        "The moon is a rock that goes around the Earth, and the sun is a star that lights both.",
    ),
}


def worked_example(parts: list[tuple[str, str]], conclusion: str, answer: str) -> str:
    """A reply in the ThreadWeaver format."""
    outlines = "".join(f"<Outline>{i}: {name}</Outline>\n" for i, (name, _) in enumerate(parts, 1))
    threads = "".join(f"<Thread>\n{i}: {name} {text}\n</Thread>" for i, (name, text) in enumerate(parts, 1))
    return (
        f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n"
        f"<Conclusion>{conclusion}</Conclusion>\n</Parallel>\n{answer}"
    )


@sgl.function
def solve(s, question):  # type: ignore[no-untyped-def]
    """The program: two worked examples, the question, and the model's own forks and joins."""
    for asked, reply in EXAMPLES.items():
        s += sgl.user(asked)
        s += sgl.assistant(worked_example(*reply))
    s += sgl.user(question)
    budget = apr.Budget(tokens=260, width=4, branch_tokens=40, outline_chars=24)
    s += sgl.assistant(apr.reason("answer", budget=budget, min_blocks=1, max_blocks=1, min_width=3, plain=True))


async def replay(url: str, trajectories: list[apr.Trajectory]) -> list[Replay]:
    """The same branches, decoded one after another."""
    async with await apr.HttpEngine.connect(url) as engine:
        return [
            await replay_serially(engine, t)
            for t in track(trajectories, "branches one by one", console=Console(stderr=True))
        ]


def main() -> None:
    """Ask, show the trees and the figures, and print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="a server: sgl-apr serve --model MODEL")
    url = parser.parse_args().url
    console = Console(width=120)
    trajectories: dict[str, apr.Trajectory] = {}
    with apr.Endpoint(url) as endpoint:
        for question in track(QUESTIONS, "reasoning", console=Console(stderr=True)):
            state = solve.run(question=question, backend=endpoint, temperature=0.3, top_p=0.9)
            trajectories[question] = state.get_meta_info("answer")["trajectory"]
            console.print(tree(trajectories[question], question))
    runs = list(trajectories.values())
    console.print(summary(trajectories))
    replays = asyncio.run(replay(url, runs))
    parallel, serial = sum(r.parallel_s for r in replays), sum(r.serial_s for r in replays)
    tokens = sum(r.tokens for r in replays)
    console.print(
        f"{tokens} branch tokens: {parallel:.1f} s at once, {serial:.1f} s one branch after another "
        f"({serial / parallel:.2f}x)"
    )
    metrics = [t.metrics() for t in runs]
    branch_calls = [c for t in runs for c in t.calls if c.phase == "body"]
    valid = sum(apr.dialect(t.dialect).is_valid(t.text) for t in runs)
    figures = {
        "ok": valid == len(runs) and all(t.blocks for t in runs),
        "questions": len(runs),
        "valid": valid,
        "forks": sum(m.blocks for m in metrics),
        "branches": sum(m.branches for m in metrics),
        "min_cached_share": min((c.cached_tokens / c.shared_tokens for c in branch_calls), default=0.0),
        "total_tokens": sum(m.total for m in metrics),
        "critical_path": sum(m.critical_path for m in metrics),
        "wall_s": round(sum(m.wall_s for m in metrics), 2),
        "serial_wall_s": round(sum(m.wall_s for m in metrics) - parallel + serial, 2),
    }
    print(json.dumps(figures))
    if not figures["ok"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
