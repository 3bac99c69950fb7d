"""Times the training structure of 16 sequences that inference has run, 28,000 tokens in a line, and its memory.

python -m benchmarks.training.tree_build [--json] [--check] [--reps 9]

One reply of three forks into four: four requests of the trunk and twelve of branches, of which all but the first of each
fork are read again behind the join.
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
SECONDS = 0.1


def reply(rng: random.Random) -> apr.Trajectory:
    """As a server would have written it, one token a character."""

    def words(count: int) -> str:
        return "".join(rng.choice(string.ascii_lowercase + " ") for _ in range(count))

    text = words(TRUNK)
    for _ in range(FORKS):
        outlines = "".join(f"<Outline>{k}: {words(20)}</Outline>\n" for k in range(1, WIDTH + 1))
        threads = "".join(f"<Thread>\n{k}:{words(BRANCH)}</Thread>" for k in range(1, WIDTH + 1))
        text += f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n</Parallel>{words(TRUNK)}"
    dialect = apr.dialect("threadweaver")
    return dialect.parse(text, apr.ByteTokenizer(dialect.tags)).with_prompt("Q: ", tuple(b"Q: "))


def made(trajectory: apr.Trajectory) -> tuple[TrainingTree, Visibility]:
    found = build_training_tree([trajectory])
    return found, Visibility.from_trees([found.tree])


def measured(reps: int) -> dict[str, Any]:
    trajectory = reply(random.Random(0))
    seconds = []
    for _ in range(reps):
        began = time.perf_counter()
        found, _ = made(trajectory)
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    made(trajectory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "sequences": FORKS * (WIDTH + 1) + 1,
        "flat_tokens": found.tokens,
        "losses": len(found.sources),
        "seconds": statistics.median(seconds),
        "peak_mb": peak / 2**20,
    }


def main() -> int:
    """Print what was measured; with --check, status 1 if the bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reps", type=int, default=9, help="of which the median counts (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 above {SECONDS} s")
    options = parser.parse_args()
    found = measured(options.reps)
    found["hardware"] = hardware()
    if options.json:
        print(json.dumps(found))
    else:
        Console().print(
            f"{found['flat_tokens']:,} tokens of {found['sequences']} sequences: {1000 * found['seconds']:.1f} ms, "
            f"{found['peak_mb']:.1f} MB at the most"
        )
    return int(options.check and found["seconds"] > SECONDS)


if __name__ == "__main__":
    sys.exit(main())
