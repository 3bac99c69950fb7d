"""Mathematics as a task: reading, voting and verification by math-verify, with a timeout for each formula."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.json_worker import ANSWER_TIMEOUT_S
from sgl_apr.evaluation.tasks.mathematics import FORMULA_WORKER, FormulaWorker, MathAnswer, MathTask
from sgl_apr.methods.best_of_n import best_of_n
from sgl_apr.methods.self_consistency import self_consistency


@pytest.fixture(scope="module")
def task() -> Iterator[MathTask]:
    yield MathTask(
        apr.ScriptedEngine(lambda request, prompt: ""), answers={"half?": "\\frac{1}{2}", "x?": "x=5"}
    )
    FORMULA_WORKER.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is $1+1=2$, so \\boxed{2}.", "2"),
        ("Half of it: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("so $x = 3$", "x = 3"),
        ("Six times seven.\nAnswer: 42", "42"),
        ("I do not know.", ""),
        ("\\boxed{}", ""),
        ("\\boxed{7", ""),
        ("", ""),
    ],
)
def test_answers(task: MathTask, text: str, answer: str):
    assert task.answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1/2", "0.5", True), ("\\frac{2}{4}", "\\frac12", True), ("\\sqrt{8}", "2\\sqrt{2}", True), ("x+1", "1+x", True),
        ("x=5", "5", True), ("\\{1,2\\}", "\\{2,1\\}", True), ("(1,2)", "(2,1)", False), ("0.33", "1/3", False),
        ("2", "3", False), ("", "0", False), ("__import__('os')", "0", False),
    ],
)  # fmt: skip
def test_equal_answers_have_equal_keys(task: MathTask, one: str, other: str, same: bool):
    assert (task.vote_key(one) == task.vote_key(other)) == same
    assert (task.vote_key(other) == task.vote_key(one)) == same
    assert len(Counter(map(task.vote_key, (one, other)))) == (1 if same else 2)


def test_verify(task: MathTask):
    assert [task.verify("half?", answer) for answer in ("0.5", "1", "")] == [True, False, False]
    assert task.verify("x?", "5") is True
    assert task.verify("another?", "5") is None
    assert not task.verifiable  # by a method: it would have to know the answer


def test_has_answer(task: MathTask):
    steps = ("so $x = 3$", "It is \\boxed{3}.", "Answer: 3")
    assert [task.has_answer(text) for text in steps] == [False, True, True]


REPLIES = ("\\boxed{1}", "\\boxed{0.5}", "so $\\frac12$", "none", "\\boxed{\\frac{2}{4}}", "\\boxed{1}")


def script() -> Any:
    replies = iter(REPLIES)

    def say(request: apr.Request, prompt: str) -> str:
        if "Is the answer above right" in prompt:
            return "Yes" if "0.5" in prompt or "12" in prompt else "No"
        return next(replies)

    return say


def test_equal_answers_share_their_votes():
    engine = apr.ScriptedEngine(script())
    found = asyncio.run(self_consistency(engine, "half?", task=MathTask(engine), n=6))
    assert (found.answer, found.score) == ("\\frac{1}{2}", 0.5)  # 0.5, as the library writes it
    engine = apr.ScriptedEngine(script())
    found = asyncio.run(best_of_n(engine, "half?", task=MathTask(engine), n=6, select="weighted"))
    assert found.score == 2.0
    assert MathAnswer(found.answer) == MathAnswer("1/2")


def test_a_method_does_not_see_the_correct_answer():
    engine = apr.ScriptedEngine(script())
    task = MathTask(engine, answers={"half?": "1"})
    found = asyncio.run(best_of_n(engine, "half?", task=task, n=6))
    assert task.verify("half?", found.answer) is False


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9}}}",
        pytest.param("10^{1000000000}", marks=pytest.mark.slow),
        pytest.param("1000000000!", marks=pytest.mark.slow),
        "(" * 3000,
        "2^" * 3000 + "2",
    ],
)
def test_no_formula_takes_long(text: str):
    began = time.monotonic()
    assert MathAnswer(text) != MathAnswer("3")
    assert time.monotonic() - began < 15
    assert MathAnswer("1/2") == MathAnswer("0.5")


def test_from_another_thread():
    results = list[bool]()
    thread = Thread(target=lambda: results.append(MathAnswer("0.25") == MathAnswer("1/4")))
    thread.start()
    thread.join(60)
    assert results == [True]


def test_a_process_that_died_or_hangs_is_restarted(monkeypatch: pytest.MonkeyPatch):
    formulas = FormulaWorker()
    assert formulas.call("extract_answer", "$1$") == "1"
    assert formulas._process
    os.kill(formulas._process.pid, signal.SIGKILL)
    formulas._process.wait()
    assert formulas.call("extract_answer", "$2$") == "2"
    os.kill(formulas._process.pid, signal.SIGSTOP)
    formulas.timeout_s = 0.3
    assert formulas.call("extract_answer", "$3$") is None
    assert formulas._process is None
    formulas.timeout_s = ANSWER_TIMEOUT_S
    assert formulas.call("extract_answer", "$4$") == "4"
    formulas.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(apr.AprError, match="did not start"):
        formulas.call("extract_answer", "$5$")
