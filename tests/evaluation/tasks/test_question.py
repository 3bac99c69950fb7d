"""Open questions as a task: the prompts of each method, and how replies are read."""

from __future__ import annotations

import asyncio
from math import log
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.engine.scripted import ByteTokenizer
from sgl_apr.evaluation.tasks.chat_template import CHATML, PLAIN, ChatTemplate, chat_template_for
from sgl_apr.evaluation.tasks.question import Draft, QuestionTask
from sgl_apr.methods.prompt import Completion
from sgl_apr.methods.registry import MethodResult, method

TAGS = ["<|im_start|>", "<|im_end|>"]
LLAMA = ChatTemplate("<user>", "</user><model>", "</model>")


def completion(text: str, logprob: float | None = None) -> Completion:
    return Completion(None, None, text, "eos", logprob)  # type: ignore[arg-type]


@pytest.fixture
def task() -> QuestionTask:
    return QuestionTask(apr.ScriptedEngine(lambda request, prompt: "", ByteTokenizer(TAGS)))


def test_chat_turns():
    assert chat_template_for(ByteTokenizer(TAGS)) is CHATML
    assert chat_template_for(ByteTokenizer()) is PLAIN
    assert (
        CHATML.turn("Sure?", first=False)
        == "<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert PLAIN.turn("Q") + "A" + PLAIN.turn("Sure?", first=False) == "Q\n\nA\n\nSure?\n\n"


def test_every_prompt_uses_the_given_chat_template():
    task = QuestionTask(apr.ScriptedEngine(lambda request, prompt: ""), LLAMA)
    plan = Draft("Q", "plan")
    prompts = [
        task.prompt("Q"),
        task.proposal_prompt(Draft("Q")),
        task.proposal_prompt(plan),
        task.evaluate(plan),
        task.vote_prompt("Q", ["a", "b"]),
    ]
    for ask in prompts:
        assert ask.text.startswith("<user>")
        assert ask.text.endswith("</user><model>")
        assert ask.text.count("<user>") == 1
    assert task.skeleton_prompt("Q").text.endswith("</user><model>1.")
    assert task.judge_prompt("Q").text.startswith("</model><user>")
    assert task.point_prompt("Q", " a\n2. b", 2, "b").text.endswith("</user><model>2. b")
    assert task.point_prompt("Q", None, 2, "b").text.startswith("</model><user>")
    assert task.prompt_text("Q", "Fork.").endswith("\nFork.</user><model>")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is so.\nAnswer: 42", "42"),
        ("**Answer:** 42.", "42"),
        ("Answer: 1\nNo.\nanswer:\nParis, France\nthanks", "Paris, France"),
        ("  They are loyal.\n", "They are loyal."),
        ("", ""),
    ],
)
def test_answers(task: QuestionTask, text: str, answer: str):
    assert task.answer(text) == answer
    assert task.solution(Draft("Q", "plan", text)) == (answer or None)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (
            " Warm fur\n2. Good company.\n3) Play\n\nThese are the points.",
            ["Warm fur", "Good company.", "Play"],
        ),
        (" one\n3. three\n2. two", ["one"]),  # as far as they are numbered
        ("", []),
    ],
)
def test_points(task: QuestionTask, text: str, points: list[str]):
    assert task.points(text) == points


def test_point_prompts_share_all_but_the_point(task: QuestionTask):
    one, two = (task.point_prompt("Why?", " a\n2. b", k, p).text for k, p in ((1, "a"), (2, "b")))
    same = one[: next(k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)]
    assert "Why?" in same
    assert "1. a\n2. b" in same
    assert same.endswith("Write out point ")


@pytest.mark.parametrize(
    ("thought", "score"),
    [
        (completion("Yes", log(0.8)), 0.8), (completion("No", log(0.8)), 0.2), (completion("Y", log(0.6)), 0.6), (completion("Yes"), 1.0),
        (completion("No"), 0.0),
    ],
)  # fmt: skip
def test_a_judge_scores_by_the_probability_of_yes(task: QuestionTask, thought: Completion, score: float):
    assert task.judge_score(thought) == pytest.approx(score)
    ask = task.judge_prompt("Q")
    assert (ask.tokens, ask.sampling) == (1, {"temperature": 1.0})
    assert ask.grammar == 'start: "Yes" | "No"\n'


def test_a_judge_prompt_for_another_grammar_backend():
    class Other(apr.ScriptedEngine):
        grammar_backend = "xgrammar"  # type: ignore[assignment]

    assert (
        QuestionTask(Other(lambda request, prompt: "")).judge_prompt("Q").grammar == 'root ::= "Yes" | "No"\n'
    )


@pytest.mark.parametrize(
    ("text", "value"), [("Fine.\nScore: 7", 0.7), ("**Score:** 10/10", 1.0), ("score 99", 1.0), ("good", 0.0)]
)
def test_values(task: QuestionTask, text: str, value: float):
    assert task.value(Draft("Q"), completion(text)) == value


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Choice 1 is bad.\nThe best choice is 2", 1),
        ("The best choice is **3**.", 2),
        ("choice 4", None),
        ("", None),
    ],
)
def test_choices(task: QuestionTask, text: str, choice: int | None):
    assert task.choice(text, 3) == choice


def test_an_answer_is_drafted_in_two_steps(task: QuestionTask):
    start = task.initial_state("Q")
    (plan,) = task.expand(start, " plan \n")
    (done,) = task.expand(plan, "text")
    assert [task.solution(state) for state in (start, plan, done)] == [None, None, "text"]
    assert [task.show(state) for state in (plan, done)] == ["plan", "text"]
    assert "plan" in task.proposal_prompt(plan).text
    assert task.expand(start, "  ") == []


def test_shared_context_and_the_end_of_workers(task: QuestionTask):
    alone, _ = task.shared_context_prompt("Q", "", ["", ""])
    assert alone == task.prompt_text("Q", alone.split("\n")[3].removesuffix("<|im_end|>"))
    seen, ask = task.shared_context_prompt("Q", "mine so", ["one", "", "two"], "done.\n\n")
    assert (
        seen
        == f"{alone}### Past steps\n\ndone.\n\n### Work of others\n\none\n\ntwo\n\n### Own work\n\nmine so"
    )
    assert ask.text == ""
    assert [task.has_answer(text) for text in ("I think.\n\n", "So.\nAnswer: 42\n\n")] == [False, True]


def test_workers_of_a_group_are_told_how_they_see_each_other(task: QuestionTask):
    for kind, words, header in (
        ("group_think", "you see every word that the others have written so far", "**Bob:** "),
        ("hogwild", "A step begins with the name of who writes it and its number", "**Bob [1]:** "),
    ):
        context, prompts = task.worker_prompts("How deep is the sea?", 3, kind)  # type: ignore[arg-type]
        assert context.index("How deep is the sea?") < context.index(words)
        assert context.endswith("<|im_start|>assistant\n")
        assert [prompt.text for prompt in prompts][1] == header
        assert [prompt.name for prompt in prompts] == ["Alice", "Bob", "Carol"]


def script(request: apr.Request, prompt: str) -> str:
    """A model that follows each of the instructions."""
    message = prompt.rpartition("<|im_start|>user\n")[2]
    for instruction, reply in (
        ("write its skeleton", " Warm fur\n2. Good company"),
        ("Write out point 1", ": they are warm."),
        ("Write out point 2", ": they stay."),
        ("Is the answer above right", "Yes"),
        ("write a plan", "Think, then say it."),
        ("give it a score", "Good.\nScore: 8"),
        ("Which is the best", "The best choice is 1"),
        ("Improve this answer", "Better.\nAnswer: 42"),
        ("", "6 times 7.\nAnswer: 42"),
    ):
        if instruction in message:
            return reply
    raise AssertionError(prompt)


@pytest.mark.parametrize(
    ("name", "options", "answer", "score"),
    [
        ("sequential", {}, "42", None),
        ("self_consistency", {"n": 3}, "42", 1.0),
        ("best_of_n", {"n": 3}, "42", 1.0),
        ("best_of_n", {"n": 3, "select": "weighted"}, "42", 3.0),
        ("skeleton_of_thought", {}, "1. Warm fur: they are warm.\n2. Good company: they stay.", None),
        (
            "skeleton_of_thought",
            {"mode": "fork"},
            "1. Warm fur: they are warm.\n2. Good company: they stay.",
            None,
        ),
        ("tree_of_thoughts", {}, "42", 0.8),
        ("tree_of_thoughts", {"select": "vote"}, "42", 1.0),
        ("graph_of_thoughts", {}, "42", None),
        ("mcts", {"simulations": 3}, "42", 0.8),
        ("group_think", {"thinkers": 2}, "42", 1.0),
        ("hogwild", {}, "42", 1.0),
    ],
)
def test_methods_on_open_questions(name: str, options: dict[str, Any], answer: str, score: float | None):
    engine = apr.ScriptedEngine(script, ByteTokenizer(TAGS))
    budget = apr.Budget(tokens=60_000)  # a token is a byte here
    found: MethodResult = asyncio.run(
        method(name)(
            engine, "What is 6 times 7?", task=QuestionTask(engine), budget=budget, seed=0, **options
        )
    )
    assert (found.answer, found.score) == (answer, score and pytest.approx(score))
    calls = [c for c in found.trajectory.calls if c.cached_tokens is not None]
    assert all(c.cached_tokens >= c.shared_tokens - 1 for c in calls)
    decoded = [s for s in found.trajectory.spans if s.origin == "decoded"]
    assert all(s.text for s in decoded)
    assert found.metrics.critical_path <= found.metrics.total


def test_the_graph_of_a_question():
    engine = apr.ScriptedEngine(script, ByteTokenizer(TAGS))
    asyncio.run(method("graph_of_thoughts")(
        engine, "Why?", task=QuestionTask(engine), budget=apr.Budget(tokens=60_000)
    ))  # fmt: skip
    prompts = [engine.tokenizer.decode(r.input_ids) for r in engine.requests]
    assert sum("give it a score" in p for p in prompts) == 15  # five drafts, three times each
    merge, improve = prompts[-2:]
    assert merge.count("6 times 7.") == 3
    assert "Improve this answer" in improve
