"""Open questions of adaptive parallel reasoning in miniature: short runs, and a table for each.

python -m benchmarks.quality.ablations --model MODEL --twin SEQUENTIAL [--rl MODEL] [--parts rewards,scaffold,ability,width] -o DIR

rewards   Which reward keeps parallelism? It trains shortly with each reward, then with accuracy alone.
scaffold  Does a model keep the gain of reinforcement if it must not fork?
ability   Do demonstrations teach a format or an ability? The grammar forces the twin to fork, which has only seen forks of
          short problems; and the trained model runs without a grammar.
width     Does a model follow the number of branches in its prompt, if it was trained with such prompts?

All results are stored in DIR, and a second run continues. Replies are sampled at temperature 1.
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
from sgl_apr.training.config import Data, Model, SftConfig, Steps
from sgl_apr.training.grpo_config import GrpoConfig, HeldOut, Rollouts, Updates
from sgl_apr.training.grpo_log import GrpoStepLog

BUDGET = apr.Budget(tokens=6000, width=16, branch_tokens=160)
REWARDS = {
    "accuracy": "accuracy alone",
    "naive_threads": "a bonus for each branch",
    "parallel_r1_product": "accuracy x structure, binary",
    "parallel_r1": "alternating, 8 steps of 10 accuracy alone",
    "gated": "accuracy x (1 + 0.3 x critical-path ratio)",
}
RELAXED = ("naive_threads", "gated")  # the rewards that pay most and least for branches
WIDTHS = (2, 4, 6, 8)


class WidthPromptTask(CountdownTask):
    """A task whose prompts say how many branches each fork shall have."""

    def __init__(self, engine: apr.Engine, width: int) -> None:
        super().__init__(engine)
        self.width = width

    def prompt_text(self, problem: Problem, instruction: str = "") -> str:
        return problem.prompt(self.width)


class Experiments:
    """Training runs and evaluations in one directory."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.benchmark = countdown(options.limit, "test", seed=1)

    def reinforced_model(self, name: str, start: Path, reward: str) -> Path:
        """The model after some steps of reinforcement; trains it if it does not exist yet."""
        model: Path = self.out / name / "model"
        if model.is_dir():
            return model
        rollouts = Rollouts(problems=self.options.problems, tokens=BUDGET.tokens, reward=reward)
        # This reward pays for structure in the last two of ten steps.
        steps = self.options.steps * (2 if reward == "parallel_r1" else 1)
        updates = Updates(steps=steps, rate=self.options.rate, branch_credit="trunk")
        progress = iter(track(range(updates.steps), name, console=Console(stderr=True)))
        config = GrpoConfig(
            Model(path=str(start)), rollouts=rollouts, updates=updates, heldout=HeldOut(every=0)
        )

        def advance(_: GrpoStepLog) -> None:
            next(progress, None)

        return grpo.train(config, self.out / name, advance)

    def evaluate(self, name: str, model: Path, width: int | None = None, **options: Any) -> MethodResults:
        """The results of a model on the problems; `width` is stated in the prompts."""
        directory, benchmark = self.out / "eval" / name.replace(" ", "-"), self.benchmark
        stated = options if width is None else {**options, "width": width}
        settings = {"model": str(model), "limit": len(benchmark.cases)} | {
            k: str(v) for k, v in stated.items()
        }
        if width is not None:
            benchmark = replace(benchmark, task=partial(WidthPromptTask, width=width))
        arguments: dict[str, Any] = {"mode": "auto", "temperature": 1.0, "budget": BUDGET, **options}
        with open_evaluation(directory, settings) as store:
            if len(store.attempts.get(name, ())) == len(benchmark.cases):
                return store.results_of(name)
            log = self.out / "server.log"
            with Server(model, log_path=log, context_length=2048, **SERVER_OPTIONS) as server:
                return asyncio.run(
                    evaluate(server.url, benchmark, name, store, implementation="apr", **arguments)
                )


def rewards(experiments: Experiments, options: argparse.Namespace) -> Iterator[MethodResults]:
    """Each reward, and some of them followed by accuracy alone."""
    yield experiments.evaluate("before", options.model)
    for reward in REWARDS:
        model = experiments.reinforced_model(reward, options.model, reward)
        yield experiments.evaluate(reward, model)
        if reward in RELAXED:
            yield experiments.evaluate(
                f"{reward} then accuracy",
                experiments.reinforced_model(f"{reward}-relaxed", model, "accuracy"),
            )


def scaffold(experiments: Experiments, options: argparse.Namespace) -> Iterator[MethodResults]:
    """Before and after reinforcement, with and without forks; and the twin."""
    for name, model in (("before", options.model), ("after", options.rl)):
        yield experiments.evaluate(f"{name} free", model)
        yield experiments.evaluate(f"{name} no forks", model, mode="sequential")
    yield experiments.evaluate("twin no forks", options.twin, mode="sequential")


def ability(experiments: Experiments, options: argparse.Namespace) -> Iterator[MethodResults]:
    """Forks by grammar, by training, and by both."""
    yield experiments.evaluate("trained grammar", options.model)
    yield experiments.evaluate("trained no grammar", options.model, constrain=False)
    yield experiments.evaluate("twin grammar", options.twin)
    yield experiments.evaluate("twin grammar forks", options.twin, mode="parallel")


def width(experiments: Experiments, options: argparse.Namespace) -> Iterator[MethodResults]:
    """A model that was trained with its width in the prompt, with several widths."""
    data = Data(numbers=(3, 4), problems=8000, state_width=1.0)
    steps = Steps(tokens=options.tokens, batch=4096, rate=1e-3)
    model = experiments.out / "width" / "model"
    if not model.is_dir():
        config = SftConfig(Model(path=str(options.model)), data, steps)
        with Console(stderr=True).status("training with a stated width"):
            model = sft.train(config, experiments.out / "width")
    for stated in WIDTHS:
        yield experiments.evaluate(f"width {stated}", model, width=stated)


PARTS = {"rewards": rewards, "scaffold": scaffold, "ability": ability, "width": width}


def line(row: MethodResults) -> dict[str, Any]:
    """The figures of one experiment."""
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
    """Run the experiments, and print a table for each question or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the model that was trained on demonstrations that fork")
    add("--twin", type=Path, required=True, help="the model that was trained on sequential demonstrations")
    add("--rl", type=Path, help="--model after reinforcement; needed by the part scaffold")
    add("--parts", default=",".join(PARTS), help="default: %(default)s")
    add("--steps", type=int, default=5, help="steps of reinforcement per reward (default: %(default)s)")
    add(
        "--problems",
        type=int,
        default=16,
        help="problems per step, with 8 replies each (default: %(default)s)",
    )
    add("--rate", type=float, default=0.06, help="learning rate (default: %(default)s)")
    add(
        "--tokens",
        type=int,
        default=2_000_000,
        help="training tokens with a stated width (default: %(default)s)",
    )
    add("--limit", type=int, default=200, help="held-out problems per evaluation (default: %(default)s)")
    add("-o", "--out", type=Path, required=True)
    add("--json", action="store_true")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if "scaffold" in parts and options.rl is None:
        parser.error("scaffold needs --rl")
    options.out.mkdir(parents=True, exist_ok=True)
    experiments = Experiments(options)
    results = {name: [line(row) for row in PARTS[name](experiments, options)] for name in parts}
    if options.json:
        print(json.dumps({"hardware": hardware(), **results}))
        return
    console = Console(width=150)
    for name, lines in results.items():
        table = Table(*lines[0], title=name)
        for cells in lines:
            table.add_row(*map(str, cells.values()))
        console.print(table)


if __name__ == "__main__":
    main()
