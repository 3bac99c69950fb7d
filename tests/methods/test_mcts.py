"""Monte Carlo tree search: the selected leaves against UCT as written out here, parallel leaves, and the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from math import exp, log, sqrt
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import Inapplicable, Task, ValuedSearchTask


def worth(word: str) -> float:
    return round(random.Random(word).random(), 2)


class Words(ValuedSearchTask[str, str]):
    """Words of a and b, letter by letter; `goal` is the answer, whose value is 1."""

    name, max_tokens, step_tokens, max_steps = "words", 10, 4, 4
    goal = "none"

    def initial_state(self, problem: str) -> str:
        return ""

    def proposal_prompt(self, state: str) -> Prompt:
        return Prompt(f"next of {state!r}: ", tokens=self.step_tokens)

    def expand(self, state: str, text: str) -> Sequence[str]:
        return [state + letter for letter in text if letter.isalpha()]

    def solution(self, state: str) -> str | None:
        return state if state == self.goal else None

    def evaluate(self, state: str) -> Prompt | float:
        return 1.0 if state == self.goal else Prompt(f"worth of {state!r}: ", tokens=5)

    def value(self, state: str, thought: Completion) -> float:
        return float(thought.text or 0)


def script(request: apr.Request, prompt: str) -> str:
    what, _, rest = prompt.partition(" of ")
    return "ab" if what == "next" else f"{worth(rest.split(chr(39))[1])}"


def search(
    task: type[Task[str]] = Words, script: Any = script, **options: Any
) -> tuple[MethodResult, list[str], apr.ScriptedEngine]:
    """What it comes to, the states that were expanded in that order, and the engine."""
    engine = apr.ScriptedEngine(script)
    found = asyncio.run(method("mcts")(engine, "words", task=task(engine), seed=0, **options))
    prompts = [bytes(r.input_ids).decode() for r in engine.requests]
    assert not engine.active
    return found, [p.split("'")[1] for p in prompts if p.startswith("next")], engine


def uct(simulations: int, leaves: int, c: float, depth: int = 4) -> list[str]:
    """The order in which UCT expands: Q/N + c * softmax prior * sqrt(ln N(parent) / N), a virtual loss for each leaf."""
    visits, sums, grown, order = {"": 0.0}, {"": 0.0}, set[str](), list[str]()

    def add(word: str, n: float, value: float) -> None:
        for k in range(len(word) + 1):
            visits[word[:k]] = visits.get(word[:k], 0) + n
            sums[word[:k]] = sums.get(word[:k], 0) + value

    def score(word: str) -> float:
        each = [exp(worth(word[:-1] + letter)) for letter in "ab"]
        prior = exp(worth(word)) / sum(each)
        return sums[word] / visits[word] + c * prior * sqrt(log(visits[word[:-1]]) / visits[word])

    while simulations > 0:
        batch = list[str]()
        for _ in range(min(simulations, leaves)):
            word = ""
            while word in grown:
                word = max((word + letter for letter in "ab"), key=score)
            batch.append(word)
            add(word, 1, 0)
        for word in batch:
            add(word, -1, 0)
        batch = list(dict.fromkeys(batch))
        simulations -= len(batch)
        for word in batch:
            if len(word) == depth:
                add(word, 1, 0)
                continue
            order.append(word)
            grown.add(word)
            for letter in "ab":
                add(word + letter, 1, worth(word + letter))
    return order


@pytest.mark.parametrize("leaves", [1, 2, 3])
@pytest.mark.parametrize("exploration", [0.0, sqrt(2), 5.0])
def test_leaves_are_selected_by_uct(leaves: int, exploration: float):
    _, expanded, engine = search(simulations=14, leaves=leaves, exploration=exploration)
    assert expanded == uct(14, leaves, exploration)
    assert len(engine.requests) == 3 * len(expanded), "one proposal, and a value of each of two children"


def test_a_virtual_loss_spreads_the_leaves():
    def steep(request: apr.Request, prompt: str) -> str:
        word = prompt.split("'")[1]
        return "ab" if prompt.startswith("next") else {"a": "0.5", "b": "0.6", "ba": "0.9"}.get(word, "0.8")

    _, alone, _ = search(script=steep, simulations=3, leaves=1, exploration=0.0)
    _, spread, _ = search(script=steep, simulations=3, leaves=2, exploration=0.0)
    assert alone == ["", "b", "ba"]
    assert spread == ["", "b", "a"]


def test_it_ends_with_an_answer_of_value_1():
    class Goal(Words):
        goal = max("ab", key=worth) + "a"

    found, expanded, _ = search(Goal, simulations=50, leaves=1, exploration=0.0)
    assert (found.answer, found.score, found.label) == (Goal.goal, 1.0, "exact")
    assert expanded == ["", Goal.goal[0]]


def test_an_answer_of_less_is_kept_until_the_end():
    class Unsure(Words):
        goal = "a"

        def evaluate(self, state: str) -> Prompt | float:
            return 0.5 if state == "a" else Prompt(f"worth of {state!r}: ", tokens=5)

    found, expanded, _ = search(Unsure, simulations=8, leaves=1)
    assert (found.answer, found.score) == ("a", 0.5)
    assert "a" not in expanded


def test_values_are_means_clipped_to_0_and_1():
    said = {"a": iter([4, 0, 0, 0]), "b": iter([0.9, 0.9, 0.9, 0.9])}

    def noisy(request: apr.Request, prompt: str) -> str:
        word = prompt.split("'")[1]
        return "ab" if prompt.startswith("next") else f"{next(said[word])}" if word in said else "0"

    _, expanded, _ = search(script=noisy, simulations=2, leaves=1, evaluations=4, exploration=0.0)
    assert expanded == ["", "a"], "a mean of 1, which is more than 0.9"
    _, expanded, _ = search(
        script=lambda r, p: "ab" if p.startswith("next") else "-3", simulations=3, leaves=1
    )
    assert len(expanded) == 3


def test_a_leaf_without_steps_is_worth_nothing():
    def barren(request: apr.Request, prompt: str) -> str:
        word = prompt.split("'")[1]
        if prompt.startswith("next"):
            return "" if word == "a" else "ab"
        return "0.9" if word == "a" else "0.2"

    _, expanded, _ = search(script=barren, simulations=12, leaves=1, exploration=0.1)
    assert expanded.count("a") == 1, "which is not asked again"
    assert {"b", "ba"} <= {*expanded}


def test_leaves_and_values_are_sampled_in_parallel():
    engine = apr.ScriptedEngine(lambda request, prompt: apr.Reply(script(request, prompt), delay=0.002))
    most, decode = 0, engine.decode

    async def counted(request: apr.Request, on_tokens: Any = None) -> apr.Result:
        nonlocal most
        most = max(most, len(engine.active) + 1)
        return await decode(request, on_tokens)

    engine.decode = counted  # type: ignore[method-assign]
    found = asyncio.run(
        method("mcts")(engine, "words", task=Words(engine), simulations=5, leaves=2, proposals=3)
    )
    assert most == 6, "three proposals from each of two leaves"
    calls = [c for c in found.trajectory.calls if c.cached_tokens is not None]
    assert all(c.cached_tokens >= c.shared_tokens - 1 for c in calls)
    assert apr.Trajectory.from_json(found.trajectory.to_json()) == found.trajectory


def test_the_same_seed_gives_the_same_search():
    one, two = (search(simulations=9)[0].trajectory for _ in range(2))
    assert [(s.text, s.parents) for s in one.spans] == [(s.text, s.parents) for s in two.spans]


@pytest.mark.parametrize("tokens", [1, 20, 60, 150])
def test_a_budget_is_kept(tokens: int):
    found, expanded, _ = search(simulations=1000, budget=apr.Budget(tokens=tokens))
    assert found.metrics.total <= tokens
    assert found.trajectory.limits
    assert len(expanded) < 10


def test_a_failure_stays_with_its_leaf():
    def broken(request: apr.Request, prompt: str) -> apr.Reply | str:
        failed = apr.Reply(error=apr.EngineError("broken", 400))
        return failed if prompt.startswith("next of 'a'") else script(request, prompt)

    found, expanded, _ = search(script=broken, simulations=8, leaves=2)
    assert expanded.count("a") == 1
    assert "b" in expanded
    assert any(b.outcome == "failed" for block in found.trajectory.blocks for b in block.branches)


def test_invalid_arguments_and_tasks_are_errors():
    for wrong in ({"simulations": 0}, {"leaves": 0}, {"proposals": 0}):
        with pytest.raises(apr.AprError, match="expected at least 1"):
            search(**wrong)

    class Plain(Task[str]):
        name = "plain"

    with pytest.raises(Inapplicable, match="plain cannot be solved step by step"):
        search(Plain)
