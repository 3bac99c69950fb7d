"""Small programs by a small model: several tries at once, and the one that passes most of the tests.

python examples/coding.py [--model smollm2] [--tries 8]
python examples/coding.py --url URL

What the model writes is run in a sandbox: no files, no network, no other processes. What a test expects is compared outside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

import sgl_apr as apr
from sgl_apr.evaluation.tasks.chat_template import chat_template_for
from sgl_apr.methods.best_of_n import best_of_n
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult
from sgl_apr.methods.sandbox.process import Limits, Sandbox
from sgl_apr.methods.task import SampledTask
from sgl_apr.training.models import locate_model, smollm2
from sgl_apr.views.tree import render_summary

LIMITS = Limits(seconds=2.0, cpu=4)
FENCE = "```"


@dataclass(frozen=True)
class Exercise:
    """A function that is asked for, and what it returns for some arguments."""

    text: str
    signature: str
    tests: tuple[tuple[tuple[Any, ...], Any], ...]

    @property
    def name(self) -> str:
        return self.signature.partition("(")[0]

    @property
    def asked(self) -> str:
        return f"Write a Python function {self.signature} that {self.text}."


SHOWN = Exercise("returns the square of n", "square(n)", ()), " n * n\n"
EXERCISES = (
    Exercise("returns two times n", "double(n)", (((3,), 6), ((0,), 0), ((-4,), -8))),
    Exercise("says whether n is even", "is_even(n)", (((2,), True), ((7,), False), ((0,), True))),
    Exercise("returns the larger of a and b", "larger(a, b)", (((1, 2), 2), ((5, 3), 5), ((4, 4), 4))),
    Exercise("returns the sum of a list of numbers", "total(numbers)", ((([1, 2, 3],), 6), (([],), 0))),
)


class CodingTask(SampledTask[Exercise]):
    """One exercise is shown with its solution; the reply goes on where the function returns something."""

    name = "coding"
    max_tokens = 64

    def ask(self, problem: Exercise) -> Prompt:
        chat = chat_template_for(self.engine.tokenizer)
        shown, body = SHOWN
        begun = chat.turn(shown.asked) + self.head(shown) + body + FENCE
        return Prompt(
            begun + chat.turn(problem.asked, first=False) + self.head(problem),
            tokens=self.max_tokens,
            stop=(FENCE,),
        )

    def head(self, problem: Exercise) -> str:
        return f"{FENCE}python\ndef {problem.signature}:\n    return"

    def answer(self, text: str) -> str:
        """What the function returns."""
        return text.partition(FENCE)[0].strip()


async def passed(problem: Exercise, text: str) -> float:
    """The share of its tests that a reply passes."""
    code = f"def {problem.signature}:\n    return{text.partition(FENCE)[0]}\n"
    async with Sandbox({}, nobody, LIMITS) as sandbox:
        await sandbox.run(code)
        right = 0
        for arguments, expected in problem.tests:
            await sandbox.run(f"found = None\nfound = repr({problem.name}(*{arguments!r}))")
            right += await sandbox.value("found") == repr(expected)
    return right / len(problem.tests)


async def nobody(texts: list[str], deep: bool) -> list[str]:
    """Programs here have no model to ask."""
    return [""] * len(texts)


async def solve(url: str, tries: int) -> list[MethodResult]:
    """One exercise after another; the tries at one are written at once."""
    found, budget = list[MethodResult](), apr.Budget(tokens=4000)
    async with await apr.HttpEngine.connect(url) as engine:
        task = CodingTask(engine)
        for exercise in track(EXERCISES, "exercises", console=Console(stderr=True)):
            found.append(
                await best_of_n(engine, exercise, task=task, n=tries, verifier=passed, budget=budget)
            )
    return found


def main() -> None:
    """Ask, show the best of the programs, and print one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="smollm2", help="a checkpoint, served for the time being")
    which.add_argument("--url", help="a running server")
    parser.add_argument("--tries", type=int, default=8, help="at each exercise (default: %(default)s)")
    options = parser.parse_args()
    with ExitStack() as stack:
        url = options.url
        if url is None:
            model = smollm2() if options.model == "smollm2" else locate_model(options.model)
            url = stack.enter_context(apr.Server(model, max_total_tokens=16384)).url
        found = asyncio.run(solve(url, options.tries))
    console = Console(width=125)
    for exercise, result in zip(EXERCISES, found, strict=True):
        console.print(f"def {exercise.signature}:\n    return {result.answer}", markup=False)
        console.print(f"# passes {result.score or 0:.0%} of its tests\n", markup=False)
    console.print(render_summary({e.name: r.trajectory for e, r in zip(EXERCISES, found, strict=True)}))
    solved = [result.score == 1 for result in found]
    figures = {
        "ok": all(solved),
        "exercises": len(found),
        "solved": sum(solved),
        "tries": sum(r.metrics.branches for r in found),
        "total_tokens": sum(r.metrics.total for r in found),
        "critical_path": sum(r.metrics.critical_path for r in found),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
