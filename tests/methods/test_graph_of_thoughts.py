"""Graph of Thoughts against the paper: the order and parallelism of operations, what each sees, and what it keeps."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.engine.scripted import ByteTokenizer
from sgl_apr.evaluation.tasks.countdown.branch_experts import MessageExpert
from sgl_apr.evaluation.tasks.countdown.expert import ExpertNode, SearchStyle
from sgl_apr.evaluation.tasks.countdown.problems import Problem, parse_steps, solves
from sgl_apr.evaluation.tasks.countdown.task import CountdownTask
from sgl_apr.methods.graph_of_thoughts import graph_of_thoughts
from sgl_apr.methods.graph_operations import (
    Aggregate,
    Generate,
    Graph,
    GraphError,
    KeepBest,
    Refine,
    Score,
    validate_graph,
)
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import GraphTask, Inapplicable, Task

# What the model says to each prompt, in turn.
REPLIES = {
    "sort ca: ": ["ca", "ac"], "sort db: ": ["bd", "db"], "merge ac bd: ": ["abcd", "acbd", "abc"], "fix abcd: ": ["abcd."],
}  # fmt: skip


def order(word: str) -> float:
    return -sum(a > b for a, b in pairwise(word)) - abs(4 - len(word))


def read(state: Any, text: str) -> Sequence[str]:
    return [text] if text else []


class Sorting(GraphTask[str, str]):
    """Letters in their order, as the paper sorts: the halves, each the better of two, then the best merge of three."""

    name, step_tokens = "sorting", 6

    def initial_state(self, problem: str) -> str:
        return problem

    def solution(self, state: str) -> str | None:
        return state or None

    def graph(self, problem: str) -> Graph:
        half = len(problem) // 2
        graph: dict[str, Any] = {}
        for name, part in {"left": slice(half), "right": slice(half, None)}.items():
            graph[name] = Generate(
                prompt=lambda word, part=part: Prompt(f"sort {word[part]}: "), read=read, k=2
            )
            graph[f"score {name}"] = Score(score=order, depends_on=(name,))
            graph[f"best {name}"] = KeepBest(depends_on=(f"score {name}",))
        return graph | {
            "merge": Aggregate(
                prompt=lambda words: Prompt(f"merge {' '.join(words)}: "),
                read=read,
                k=3,
                depends_on=("best left", "best right"),
            ),
            "score": Score(score=order, depends_on=("merge",)),
            "best": KeepBest(depends_on=("score",)),
            "fix": Refine(prompt=lambda word: Prompt(f"fix {word}: "), read=read, depends_on=("best",)),
        }


def replies(script: dict[str, list[str]] = REPLIES) -> Any:
    left = {prompt: list(said) for prompt, said in script.items()}
    return lambda request, prompt: left[prompt].pop(0)


def run(
    graph: Graph | None = None, script: Any = None, problem: str = "cadb", **options: Any
) -> tuple[MethodResult, Counter[str], apr.ScriptedEngine]:
    """What it comes to, how often each prompt was asked, and the engine."""
    engine = apr.ScriptedEngine(script or replies())
    task = Sorting(engine)
    if graph is not None:
        task.graph = lambda problem: graph  # type: ignore[method-assign]
    found = asyncio.run(graph_of_thoughts(engine, problem, task=task, seed=0, **options))
    assert not engine.active
    return found, Counter(bytes(r.input_ids).decode() for r in engine.requests), engine


def test_sorting_as_in_the_paper():
    found, asked, engine = run()
    assert asked == {"sort ca: ": 2, "sort db: ": 2, "merge ac bd: ": 3, "fix abcd: ": 1}
    assert (found.answer, found.score, found.label) == ("abcd.", None, "exact")
    assert {r.sampling["temperature"] for r in engine.requests} == {1.0}
    calls = [c for c in found.trajectory.calls if c.cached_tokens is not None]
    assert all(c.cached_tokens >= c.shared_tokens - 1 for c in calls)


def test_an_aggregate_depends_on_all_of_its_parents():
    found, _, _ = run()
    spans = found.trajectory.spans
    merge = next(i for i, s in enumerate(spans) if s.text.startswith("merge"))
    before = {spans[i].text for i in spans[merge].waits_for}
    assert before == {"ac", "bd"}  # those that were kept
    chain = [len("sort ca: ac"), len("merge ac bd: abcd"), len("fix abcd: abcd.")]
    assert found.metrics.critical_path == sum(chain)


def test_ready_operations_run_in_parallel_and_wait_for_no_other():
    heard = list[str]()
    said = replies()

    def slow(request: apr.Request, prompt: str) -> apr.Reply:
        heard.append(f"{len(engine.active)} {prompt}")
        return apr.Reply(said(request, prompt), delay=0.05 if "ca" in prompt else 0.0)

    class Chained(Sorting):
        def graph(self, problem: str) -> Graph:
            graph = dict(super().graph(problem))
            graph["fix right"] = Refine(
                prompt=lambda word: Prompt(f"fix {word}: "), read=read, depends_on=("best right",)
            )
            return graph | {"merge": Aggregate(
                prompt=graph["merge"].prompt, read=read, k=3, depends_on=("best left", "fix right")
            )}  # fmt: skip

    said = replies(REPLIES | {"fix bd: ": ["bd"]})
    engine = apr.ScriptedEngine(slow)
    found = asyncio.run(graph_of_thoughts(engine, "cadb", task=Chained(engine)))
    assert sorted(heard[:4]) == ["0 sort ca: ", "1 sort ca: ", "2 sort db: ", "3 sort db: "]
    assert heard[4] == "2 fix bd: "  # while the left half is still being sorted
    assert found.answer == "abcd."


def test_only_the_best_are_kept_in_the_order_of_their_scores():
    letters = Generate(prompt=lambda _: Prompt("letters: "), read=lambda _, text: list(text))
    graph = {
        "letters": letters,
        "score": Score(score=lambda letter: float(ord(letter)), depends_on=("letters",)),
        "best": KeepBest(n=2, depends_on=("score",)),
        "say": Aggregate(prompt=lambda states: Prompt(f"say {states}: "), read=read, depends_on=("best",)),
    }
    _, asked, _ = run(graph, lambda request, prompt: "xbzay" if prompt == "letters: " else "ok")
    assert asked == {"letters: ": 1, "say ['z', 'y']: ": 1}


def test_a_model_scores_by_the_mean_of_its_replies():
    def value(state: str, thought: Completion) -> float:
        return float(thought.text)

    graph = {
        "letters": Generate(prompt=lambda _: Prompt("letters: "), read=lambda _, text: list(text)),
        "score": Score(
            score=lambda letter: Prompt(f"{letter}? ", tokens=2), read=value, k=2, depends_on=("letters",)
        ),
        "best": KeepBest(depends_on=("score",)),
    }
    found, asked, _ = run(graph, replies({"letters: ": ["ab"], "a? ": ["9", "1"], "b? ": ["6", "6"]}))
    assert asked == {"letters: ": 1, "a? ": 2, "b? ": 2}
    assert (found.answer, found.score) == ("b", 6.0)


def test_a_state_without_a_prompt_stays_as_it_is():
    graph = {
        "letters": Generate(prompt=lambda _: Prompt("letters: "), read=lambda _, text: list(text)),
        "twice": Generate(
            prompt=lambda letter: None if letter == "a" else Prompt(f"{letter}: "),
            read=read,
            k=2,
            depends_on=("letters",),
        ),
        "fix": Refine(
            prompt=lambda word: Prompt(f"fix {word}: ") if len(word) > 1 else None,
            read=read,
            depends_on=("twice",),
        ),
        "say": Aggregate(
            prompt=lambda states: Prompt(f"say {' '.join(states)}: "), read=read, depends_on=("fix",)
        ),
    }
    said = {
        "letters: ": ["ab"],
        "b: ": ["bb", "bc"],
        "fix bb: ": [""],
        "fix bc: ": ["d"],
        "say a bb d: ": ["ok"],
    }
    found, _, _ = run(graph, replies(said))  # nothing can be read of the reply about bb
    assert found.answer == "ok"


def test_a_reply_that_fails_is_missed_by_its_operation_only():
    def broken(request: apr.Request, prompt: str) -> Any:
        said[prompt] += 1
        if said[prompt] == 1 and prompt in ("sort ca: ", "fix abcd: "):
            return apr.Reply("zz", error=apr.EngineError("broken", 400))
        return {"sort ca: ": "ac", "sort db: ": "bd", "merge ac bd: ": "abcd"}[prompt]

    said = Counter[str]()
    found, asked, _ = run(script=broken)
    assert asked["sort ca: "] == 2
    assert found.answer == "abcd"
    said.clear()
    with pytest.raises(apr.EngineError, match="broken"):
        run(script=broken, on_branch_failure="raise")


def test_nothing_is_left():
    found, asked, _ = run(script=lambda request, prompt: "")
    assert (found.answer, found.score) == ("", None)
    assert set(asked) == {"sort ca: ", "sort db: "}


@pytest.mark.parametrize("tokens", [1, 30, 60, 100, 150])
def test_a_budget_is_kept_and_leaves_something_for_what_comes_later(tokens: int):
    def script(request: apr.Request, prompt: str) -> str:
        return {"s": "a", "m": "abcd", "f": "abcd"}[prompt[0]] * 50

    found, asked, _ = run(script=script, budget=apr.Budget(tokens=tokens))
    assert found.metrics.total <= tokens
    assert "tokens" in {limit.limit for limit in found.trajectory.limits}
    if tokens == 150:
        assert any(prompt.startswith("fix") for prompt in asked)


def test_calls_are_limited():
    found, asked, _ = run(budget=apr.Budget(calls=6))
    assert found.metrics.engine_calls <= 6
    assert sum(asked.values()) <= 6


SAY = {"prompt": lambda state: Prompt("say: "), "read": read}


@pytest.mark.parametrize(
    ("graph", "error"),
    [
        ({"a": Generate(**SAY, depends_on=("b",))}, "'a' depends on 'b', expected one of a"),
        (
            {
                "a": Generate(**SAY, depends_on=("b",)),
                "b": Refine(**SAY, depends_on=("a",)),
                "c": Refine(**SAY, depends_on=("b",)),
            },
            "found a cycle of operations: . -> . -> .",
        ),
        ({"a": Generate(**SAY, depends_on=("a",))}, "found a cycle of operations: a -> a"),
        (
            {"a": Generate(**SAY), "b": KeepBest(depends_on=("a",))},
            "'b' keeps the best of 'a', which gives no scores",
        ),
        ({"b": KeepBest()}, "'b' keeps the best of nothing"),
        ({"a": Generate(**SAY), "b": Generate(**SAY)}, "found 2 last operations, expected one: a, b"),
        ({}, "found 0 last operations, expected one"),
        ({"a": Generate(**SAY, k=0)}, "'a' runs 0 times"),
    ],
)
def test_invalid_graphs_are_errors(graph: Graph, error: str):
    with pytest.raises(GraphError, match=error):
        run(graph, lambda request, prompt: pytest.fail("it was asked"))


def test_invalid_arguments_and_tasks_are_errors():
    engine = apr.ScriptedEngine(replies())
    with pytest.raises(Inapplicable, match="task cannot be cut into a graph"):
        asyncio.run(method("graph_of_thoughts")(engine, "X", task=Task[str](engine)))
    assert issubclass(GraphError, apr.AprError)
    graph = Sorting(engine).graph("cadb")
    assert validate_graph(graph) is graph


@pytest.mark.parametrize(
    ("problem", "proposed", "solved"),
    [
        (
            Problem((3, 7, 8, 12), 24),
            (" 3+ 7= 10; 24: 8 10 12", " 12- 8= 4; 24: 3 4 7", " 3+ 7= 11; 24: 8 11 12"),
            True,
        ),
        (Problem((3, 7, 8, 12), 24), (" 12- 8= 4; 24: 3 4 7",), False),
        (Problem((3, 8), 11), (), True),
    ],
)
def test_countdown_searches_after_each_first_step(problem: Problem, proposed: Sequence[str], solved: bool):
    asked = list[str]()
    tokenizer = ByteTokenizer(["<Spawn>", "</Spawn>", "<Message>", "</Message>", "<Join>", "</Join>", "<Result>", "</Result>", "<Return>", "</Return>"])  # fmt: skip

    def script(request: apr.Request, prompt: str) -> str:
        asked.append(prompt)
        if prompt.endswith("<Spawn>"):
            return (
                "\n"
                + "".join(f"<Message>{k}:>{m}</Message>\n" for k, m in enumerate(proposed, 1))
                + "</Spawn>"
            )
        if ";" not in prompt:
            return " 11"
        (step,) = parse_steps(prompt.removeprefix(">").partition(";")[0]) or ()
        node = ExpertNode(Problem.parse(prompt.partition(";")[2]), step, 1)
        return MessageExpert(problem, random.Random(0), SearchStyle(), task.dialect).write_branch(node)

    engine = apr.ScriptedEngine(script, tokenizer)
    task = CountdownTask(engine)
    found = asyncio.run(graph_of_thoughts(engine, problem, task=task))
    if proposed:  # those that are right are searched on, as the model was taught to
        assert asked == [
            f"{problem.text}<Spawn>",
            *(f">{m}" for m in proposed if m != " 3+ 7= 11; 24: 8 11 12"),
        ]
    assert solves(problem, found.answer) == solved
    assert found.score == (1.0 if solved else None)
