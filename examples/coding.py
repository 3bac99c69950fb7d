"""Small programs by a small model: several attempts in parallel, and the one that passes most of the tests.

python examples/coding.py [--model smollm2] [--tries 8]
python examples/coding.py --url URL

The programs run in a sandbox without files, network and other processes. Their results are compared outside of it.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from serving import example_parser, served

import sgl_apr as apr
from sgl_apr.evaluation.tasks.chat_template import chat_template_for
from sgl_apr.methods.best_of_n import best_of_n
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.sandbox.process import Sandbox, SandboxLimits
from sgl_apr.methods.task import SampledTask
from sgl_apr.views.tree import render_summary

LIMITS = SandboxLimits(seconds=2.0, cpu=4)
FENCE = "```"


@dataclass(frozen=True)
class Exercise:
    """A function to write: what it does, its signature, and pairs of arguments and results as tests."""

    text: str
    signature: str
    tests: tuple[tuple[tuple[Any, ...], Any], ...]

    @property
    def name(self) -> str:
        return self.signature.partition("(")[0]

    @property
    def instruction(self) -> str:
        return f"Write a Python function {self.signature} that {self.text}."

    @property
    def code(self) -> str:
        """The function up to its expression."""
        return f"def {self.signature}:\n    return"


WORKED_EXAMPLE = Exercise("returns the square of n", "square(n)", ()), " n * n\n"
EXERCISES = (
    Exercise("returns two times n", "double(n)", (((3,), 6), ((0,), 0), ((-4,), -8))),
    Exercise("says whether n is even", "is_even(n)", (((2,), True), ((7,), False), ((0,), True))),
    Exercise("returns the larger of a and b", "larger(a, b)", (((1, 2), 2), ((5, 3), 5), ((4, 4), 4))),
    Exercise("returns the sum of a list of numbers", "total(numbers)", ((([1, 2, 3],), 6), (([],), 0))),
)


class CodingTask(SampledTask[Exercise]):
    """The prompt shows a worked example, and the reply completes the expression that the function returns."""

    name = "coding"
    max_tokens = 64

    def prompt(self, problem: Exercise) -> Prompt:
        chat = chat_template_for(self.engine.tokenizer)
        example, solution = WORKED_EXAMPLE
        shown = f"{chat.turn(example.instruction)}{FENCE}python\n{example.code}{solution}{FENCE}"
        text = f"{shown}{chat.turn(problem.instruction, first=False)}{FENCE}python\n{problem.code}"
        return Prompt(text, tokens=self.max_tokens, stop=(FENCE,))

    def answer(self, text: str) -> str:
        return text.partition(FENCE)[0].strip()


async def passed(problem: Exercise, text: str) -> float:
    """The share of the tests that a reply passes."""
    async with Sandbox({}, no_model, LIMITS) as sandbox:
        await sandbox.run(f"{problem.code}{text.partition(FENCE)[0]}\n")
        count = 0
        for arguments, expected in problem.tests:
            await sandbox.run(f"found = None\nfound = repr({problem.name}(*{arguments!r}))")
            count += await sandbox.read_variable("found") == repr(expected)
    return count / len(problem.tests)


async def no_model(texts: list[str], deep: bool) -> list[str]:
    """Programs of this example cannot query a model."""
    return [""] * len(texts)


async def solve(url: str, tries: int) -> list[MethodResult]:
    """Solve one exercise after another; the attempts at an exercise are decoded in parallel."""
    results, budget = list[MethodResult](), apr.Budget(tokens=4000)
    async with await apr.HttpEngine.connect(url) as engine:
        task = CodingTask(engine)
        for exercise in track(EXERCISES, "exercises", console=Console(stderr=True)):
            results.append(
                await best_of_n(engine, exercise, task=task, n=tries, verifier=passed, budget=budget)
            )
    return results


def main() -> None:
    """Solve the exercises, show the best programs, and print one JSON object last."""
    parser = example_parser(__doc__, "smollm2")
    parser.add_argument("--tries", type=int, default=8, help="for each exercise (default: %(default)s)")
    options = parser.parse_args()
    with served(options, max_total_tokens=16384) as url:
        results = asyncio.run(solve(url, options.tries))
    console = Console()
    for exercise, result in zip(EXERCISES, results, strict=True):
        console.print(f"{exercise.code} {result.answer}", markup=False)
        console.print(f"# passes {result.score or 0:.0%} of its tests\n", markup=False)
    console.print(render_summary({e.name: r.trajectory for e, r in zip(EXERCISES, results, strict=True)}))
    solved = [result.score == 1 for result in results]
    figures = {
        "ok": all(solved),
        "exercises": len(results),
        "solved": sum(solved),
        "tries": sum(r.metrics.branches for r in results),
        "total_tokens": sum(r.metrics.total for r in results),
        "critical_path": sum(r.metrics.critical_path for r in results),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
