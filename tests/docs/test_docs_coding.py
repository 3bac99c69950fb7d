"""The verifier of the coding example: which programs pass, including those that cheat or do not end."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

import sgl_apr as apr
from sgl_apr.methods.best_of_n import best_of_n
from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def coding() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))  # as for a script
        yield importlib.import_module("coding")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (" n * 2", 1.0),
        (" n * 2\n```\nThat is all.", 1.0),
        (" 6", 1 / 3),
        (" n *", 0.0),
        (" print(6) or n + n", 1.0),
        (" __import__('os').system('echo 6')", 0.0),
        (" __import__('os')._exit(0)", 0.0),
        (" double(n)", 0.0),
        (" n * 2\nrepr = lambda x: '6'", 1 / 3),
    ],
)
def test_a_reply_is_worth_the_tests_that_it_passes(coding, text: str, share: float):
    assert asyncio.run(coding.passed(coding.EXERCISES[0], text)) == pytest.approx(share)


def test_a_program_that_does_not_end_is_ended(coding):
    assert asyncio.run(coding.passed(coding.EXERCISES[0], " [i for i in iter(int, 1)]")) == 0.0


def test_the_best_try_is_the_answer(coding):
    replies = iter([" 6\n```", " n + n\n```", " n\n```"])
    engine = apr.ScriptedEngine(lambda request, prompt: next(replies))
    task, exercise = coding.CodingTask(engine), coding.EXERCISES[0]
    found = asyncio.run(best_of_n(engine, exercise, task=task, n=3, verifier=coding.passed))
    assert (found.answer, found.score) == ("n + n", 1.0)
    assert engine.tokenizer.decode(engine.requests[0].input_ids).endswith("def double(n):\n    return")
