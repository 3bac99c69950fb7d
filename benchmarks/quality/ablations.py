"""Open questions of adaptive parallel reasoning, asked in miniature: short runs, and a table for each.

python -m benchmarks.quality.ablations --model MODEL --twin SEQUENTIAL [--rl MODEL] [--parts rewards,scaffold,ability,width] -o DIR

rewards   Which reward keeps parallelism? Short reinforcement by each; then some on by accuracy alone: do they go back?
scaffold  Does a model keep what reinforcement gave it where it may not fork?
ability   Is a demonstration a format or an ability? The twin, which has only seen forks of short problems, made to fork by
          the grammar; and the trained model without a grammar.
width     Does a model that was told how many branches it may have during training do as it is told?

Everything is kept in DIR: run again, it goes on where it was. Replies are sampled at temperature 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import sgl_apr as apr
from benchmarks.common.machine import hardware
from sgl_apr.evaluation.benchmarks.games import countdown
from sgl_apr.evaluation.metrics import MethodResults
from sgl_apr.evaluation.runner import evaluate
from sgl_apr.evaluation.store import open_evaluation
from sgl_apr.evaluation.tasks.countdown.attempts import SERVER_OPTIONS
from sgl_apr.evaluation.tasks.countdown.problems import Problem
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training import grpo, sft
from sgl_apr.training.config import Data, GrpoConfig, Model, Rollouts, SftConfig, Steps, Updates

BUDGET = apr.Budget(tokens=6000, width=16, branch_tokens=160)
REWARDS = {
    "accuracy": "accuracy alone",
    "naive_threads": "a bonus for each branch",
    "parallel_r1_product": "accuracy x structure, binary",
    "parallel_r1": "alternating, 8 steps of 10 accuracy alone",
    "gated": "accuracy x (1 + 0.3 x critical-path ratio)",
}
RELAXED = ("naive_threads", "gated")  # what pays for branches most, and least
WIDTHS = (2, 4, 6, 8)


class Told(CountdownTask):
    """Says in the prompt how many branches each fork is to have."""

    def __init__(self, engine: apr.Engine, width: int) -> None:
        super().__init__(engine)
        self.width = width

    def prompt(self, problem: Problem, instruction: str = "") -> str:
        return problem.prompt(self.width)


class Arms:
    """Runs and evaluations in one directory."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.given = countdown(options.limit, "test", seed=1)

    def learned(self, name: str, start: Path, reward: str) -> Path:
        """The model behind some steps of reinforcement."""
        model: Path = self.out / name / "model"
        if model.is_dir():
            return model
        rollouts = Rollouts(problems=self.options.problems, tokens=BUDGET.tokens, reward=reward)
        # The schedule pays for structure in the last two of ten.
        steps = self.options.steps * (2 if reward == "parallel_r1" else 1)
        updates = Updates(steps=steps, rate=self.options.rate, branches=0.0)
        shown = iter(track(range(updates.steps), name, console=Console(stderr=True)))
        config = GrpoConfig(Model(path=str(start)), rollouts=rollouts, updates=updates)

        def advance(_: grpo.GrpoStepLog) -> None:
            next(shown, None)

        return grpo.train(config, self.out / name, advance)

    def measured(self, name: str, model: Path, width: int | None = None, **options: Any) -> MethodResults:
        """What a model makes of the problems; with a width, told so."""
        directory, given = self.out / "eval" / name.replace(" ", "-"), self.given
        told = options if width is None else {**options, "width": width}
        asked = {"model": str(model), "limit": len(given.cases)} | {k: str(v) for k, v in told.items()}
        if width is not None:
            given = replace(given, task=partial(Told, width=width))
        options = {"mode": "auto", "temperature": 1.0, "budget": BUDGET} | options
        with open_evaluation(directory, asked) as found:
            if len(found.attempts.get(name, ())) == len(given.cases):
                return found.results_of(name)
            log = self.out / "server.log"
            with Server(model, log_path=log, context_length=2048, **SERVER_OPTIONS) as server:
                return asyncio.run(evaluate(server.url, given, name, found, by="apr", **options))


def rewards(arms: Arms, options: argparse.Namespace) -> Iterator[MethodResults]:
    """Each reward, and what becomes of some when only accuracy is paid for."""
    yield arms.measured("before", options.model)
    for reward in REWARDS:
        model = arms.learned(reward, options.model, reward)
        yield arms.measured(reward, model)
        if reward in RELAXED:
            yield arms.measured(
                f"{reward} then accuracy", arms.learned(f"{reward}-relaxed", model, "accuracy")
            )


def scaffold(arms: Arms, options: argparse.Namespace) -> Iterator[MethodResults]:
    """Before and after reinforcement, free and without forks; and the twin."""
    for name, model in (("before", options.model), ("after", options.rl)):
        yield arms.measured(f"{name} free", model)
        yield arms.measured(f"{name} no forks", model, mode="sequential")
    yield arms.measured("twin no forks", options.twin, mode="sequential")


def ability(arms: Arms, options: argparse.Namespace) -> Iterator[MethodResults]:
    """Forks by grammar, by training, by both."""
    yield arms.measured("trained grammar", options.model)
    yield arms.measured("trained no grammar", options.model, constrain=False)
    yield arms.measured("twin grammar", options.twin)
    yield arms.measured("twin grammar forks", options.twin, mode="parallel")


def width(arms: Arms, options: argparse.Namespace) -> Iterator[MethodResults]:
    """A model that learned with its width in the prompt, told several."""
    data = Data(numbers=(3, 4), problems=8000, state_width=True)
    steps = Steps(tokens=options.tokens, batch=4096, rate=1e-3)
    model = arms.out / "width" / "model"
    if not model.is_dir():
        config = SftConfig(Model(path=str(options.model)), data, steps)
        with Console(stderr=True).status("learning with a stated width"):
            model = sft.train(config, arms.out / "width")
    for stated in WIDTHS:
        yield arms.measured(f"told {stated}", model, width=stated)


PARTS = {"rewards": rewards, "scaffold": scaffold, "ability": ability, "width": width}


def line(row: MethodResults) -> dict[str, Any]:
    """The figures of one arm."""
    low, high = row.ci95
    four = [a for a in row.attempts if a.size == 4]
    forked = [a for a in four if a.forks]
    return {
        "arm": row.method,
        "accuracy": round(row.accuracy, 3),
        "ci95": [round(low, 3), round(high, 3)],
        "fork_rate_3": round(fmean(bool(a.forks) for a in row.attempts if a.size == 3), 3),
        "fork_rate_4": round(fmean(bool(a.forks) for a in four), 3),
        "width": round(fmean(a.branches / a.forks for a in forked), 2) if forked else None,
        "forks": round(fmean(a.forks for a in four), 2),
        "total_tokens": round(row.mean(lambda a: a.tokens), 1),
        "critical_path": round(row.mean(lambda a: a.critical_path), 1),
    }


def main() -> None:
    """Print a table for each question, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="trained on demonstrations that fork")
    add("--twin", type=Path, required=True, help="trained on demonstrations in a line")
    add("--rl", type=Path, help="--model after reinforcement, for scaffold")
    add("--parts", default=",".join(PARTS), help="default: %(default)s")
    add("--steps", type=int, default=5, help="of reinforcement in each arm (default: %(default)s)")
    add("--problems", type=int, default=16, help="of each step, 8 replies each (default: %(default)s)")
    add("--rate", type=float, default=0.06, help="of learning (default: %(default)s)")
    add(
        "--tokens", type=int, default=2_000_000, help="of learning with a stated width (default: %(default)s)"
    )
    add("--limit", type=int, default=200, help="held-out problems of each evaluation (default: %(default)s)")
    add("-o", "--out", type=Path, required=True)
    add("--json", action="store_true")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if "scaffold" in parts and options.rl is None:
        parser.error("scaffold needs --rl")
    options.out.mkdir(parents=True, exist_ok=True)
    arms = Arms(options)
    found = {name: [line(row) for row in PARTS[name](arms, options)] for name in parts}
    if options.json:
        print(json.dumps({"hardware": hardware(), **found}))
        return
    console = Console(width=150)
    for name, lines in found.items():
        table = Table(*lines[0], title=name)
        for cells in lines:
            table.add_row(*map(str, cells.values()))
        console.print(table)


if __name__ == "__main__":
    main()
