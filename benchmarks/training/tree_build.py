"""Time and memory to build the training tree of 16 sequences of a trajectory, 28,000 tokens in one row.

python -m benchmarks.training.tree_build [--json] [--check] [--reps 9]

The trajectory has three forks into four branches: four requests of the trunk and twelve of branches. After each join, all
branches except the first are read again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import sys
import time
import tracemalloc
from typing import Any

from rich.console import Console

import sgl_apr as apr
from benchmarks.common.machine import hardware
from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.training_tree import TrainingTree, build_training_tree

FORKS, WIDTH, BRANCH, TRUNK = 3, 4, 1290, 180
MAX_SECONDS = 0.1


def reply(rng: random.Random) -> apr.Trajectory:
    """A trajectory as a server would return it, one token per character."""

    def words(count: int) -> str:
        return "".join(rng.choice(string.ascii_lowercase + " ") for _ in range(count))

    text = words(TRUNK)
    for _ in range(FORKS):
        outlines = "".join(f"<Outline>{k}: {words(20)}</Outline>\n" for k in range(1, WIDTH + 1))
        threads = "".join(f"<Thread>\n{k}:{words(BRANCH)}</Thread>" for k in range(1, WIDTH + 1))
        text += f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n</Parallel>{words(TRUNK)}"
    dialect = apr.dialect("threadweaver")
    return dialect.parse(text, apr.ByteTokenizer(dialect.tags)).with_prompt("Q: ", tuple(b"Q: "))


def tree_and_mask(trajectory: apr.Trajectory) -> tuple[TrainingTree, Visibility]:
    """The training tree of a trajectory, and the visibility of its tokens."""
    tree = build_training_tree([trajectory])
    return tree, Visibility.from_trees([tree.tree])


def measure(reps: int) -> dict[str, Any]:
    """Sizes, median seconds over `reps` runs, and peak memory."""
    trajectory = reply(random.Random(0))
    seconds = []
    for _ in range(reps):
        started = time.perf_counter()
        tree, _ = tree_and_mask(trajectory)
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    tree_and_mask(trajectory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "sequences": FORKS * (WIDTH + 1) + 1,
        "flat_tokens": tree.tokens,
        "losses": len(tree.sources),
        "seconds": statistics.median(seconds),
        "peak_mb": peak / 2**20,
    }


def main() -> int:
    """Print what was measured; with --check, status 1 if the bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reps", type=int, default=9, help="repetitions, whose median counts (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 above {MAX_SECONDS} s")
    options = parser.parse_args()
    result = measure(options.reps)
    result["hardware"] = hardware()
    if options.json:
        print(json.dumps(result))
    else:
        Console().print(
            f"{result['flat_tokens']:,} tokens of {result['sequences']} sequences: {1000 * result['seconds']:.1f} ms, "
            f"{result['peak_mb']:.1f} MB at most"
        )
    return int(options.check and result["seconds"] > MAX_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
