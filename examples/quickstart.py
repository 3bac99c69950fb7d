"""Three questions for a small model that forks its own reasoning.

python examples/quickstart.py                     # serves SmolLM2-135M-Instruct, trained if it has been (docs/smollm2.md)
python examples/quickstart.py --model smollm2     # untrained, so that worked examples and the grammar make it fork
python examples/quickstart.py --url URL           # uses a running server (sgl-apr serve --model MODEL)
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import sglang as sgl
from rich.console import Console
from rich.progress import track
from serving import example_parser, served

import sgl_apr as apr
from benchmarks.runtime.replay import Replay, replay_serially
from sgl_apr.training.models import locate_model
from sgl_apr.views.tree import render_summary, render_tree

QUESTIONS = [
    "Why do people love dogs?",
    "Why should I learn to cook?",
    "How can I make new friends?",
]

# For the trained model, which decides for itself whether to fork. Its topics and wordings are in no training data.
TRAINED = "smollm2:trained"
QUESTIONS_OF_TRAINED = [
    "Suggest three reasons to visit a museum and explain them.",
    'Help me with the past tenses of "go", "sing" and "buy".',
    "How about the main languages of Japan and Brazil?",
]

# Without a frequency penalty it repeats itself; with some temperature, its branches differ.
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "frequency_penalty": 0.4}

# The model has never seen the format: two worked examples show it.
EXAMPLES = {
    "Why do people keep cats?": (
        [
            ("company", "A cat is warm and quiet. It makes a home feel less empty."),
            ("play", "Cats love to chase a string, and watching them makes people laugh."),
            ("work", "Cats catch mice and keep the kitchen clean."),
        ],
        "Cats are good company, fun and useful.",
        "People keep cats because they are warm and funny, and because they catch mice.",
    ),
    "How should I get ready for a long hike?": (
        [
            ("packing", "Take water, some food, a rain jacket and a map, and keep the bag light."),
            ("training", "Walk for an hour three times a week, and climb stairs to get strong legs."),
            ("safety", "Look at the weather, and tell a friend where you are going."),
        ],
        "Pack light, train early and stay safe.",
        "Pack water and a jacket, walk often in the weeks before, and check the weather.",
    ),
}


def worked_example(parts: list[tuple[str, str]], conclusion: str, answer: str) -> str:
    """A reply in the ThreadWeaver format."""
    outlines = "".join(f"<Outline>{i}: {name}</Outline>\n" for i, (name, _) in enumerate(parts, 1))
    threads = "".join(f"<Thread>\n{i}: {text}\n</Thread>" for i, (_, text) in enumerate(parts, 1))
    return (
        f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n"
        f"<Conclusion>{conclusion}</Conclusion>\n</Parallel>\n{answer}"
    )


@sgl.function  # type: ignore[untyped-decorator]
def solve(s: Any, question: str) -> None:
    """Two worked examples, the question, and the model's own forks and joins."""
    for example, reply in EXAMPLES.items():
        s += sgl.user(example)
        s += sgl.assistant(worked_example(*reply))
    s += sgl.user(question)
    budget = apr.Budget(tokens=300, width=4, branch_tokens=40, outline_chars=32)
    s += sgl.assistant(
        apr.reason(
            "answer", budget=budget, min_blocks=1, max_blocks=1, min_width=3, forbid_angle_brackets=True
        )
    )


@sgl.function  # type: ignore[untyped-decorator]
def solve_as_trained(s: Any, question: str) -> None:
    """The question alone: the trained model needs no example, and the mode is "auto"."""
    s += sgl.user(question)
    s += sgl.assistant(
        apr.reason("answer", budget=apr.Budget(tokens=400, width=8, branch_tokens=96), temperature=0)
    )


def default_model() -> str:
    """The trained model if there is one."""
    try:
        locate_model(TRAINED)
    except apr.AprError:
        return "smollm2"
    return TRAINED


async def replay(url: str, trajectories: list[apr.Trajectory]) -> list[Replay]:
    """Decode the same branches one after another."""
    async with await apr.HttpEngine.connect(url) as engine:
        return [
            await replay_serially(engine, t)
            for t in track(trajectories, "branches one by one", console=Console(stderr=True))
        ]


def main() -> None:
    """Ask the questions, show the trees, and print one JSON object last."""
    options = example_parser(__doc__, default_model()).parse_args()
    trained = not options.url and options.model == TRAINED
    console, trajectories = Console(), dict[str, apr.Trajectory]()
    with served(options, max_total_tokens=8192) as url, apr.Endpoint(url) as endpoint:
        questions = QUESTIONS_OF_TRAINED if trained else QUESTIONS
        for question in track(questions, "reasoning", console=Console(stderr=True)):
            if trained:
                state = solve_as_trained.run(question=question, backend=endpoint)
            else:
                state = solve.run(question=question, backend=endpoint, **SAMPLING)
            trajectories[question] = state.get_meta_info("answer")["trajectory"]
            console.print(render_tree(trajectories[question], question))
        runs = list(trajectories.values())
        console.print(render_summary(trajectories))
        replays = asyncio.run(replay(url, runs))
    parallel, serial = sum(r.parallel_s for r in replays), sum(r.serial_s for r in replays)
    tokens = sum(r.tokens for r in replays)
    console.print(
        f"{tokens} branch tokens: {parallel:.1f} s in parallel, {serial:.1f} s one branch after another "
        f"({serial / parallel:.2f}x)"
    )
    metrics = [t.metrics() for t in runs]
    branch_calls = [c for t in runs for c in t.calls if c.phase == "branch"]
    valid = sum(apr.dialect(t.dialect).is_valid(t.text) for t in runs)
    figures = {
        "ok": valid == len(runs) and all(t.blocks for t in runs),
        "questions": len(runs),
        "valid": valid,
        "forks": sum(m.blocks for m in metrics),
        "branches": sum(m.branches for m in metrics),
        "min_cached_share": min(
            ((c.cached_tokens or 0) / c.shared_tokens for c in branch_calls), default=0.0
        ),
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
