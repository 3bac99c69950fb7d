"""SPEX against tree of thoughts: the same tree, less waiting, and bounded work in vain."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.spex import LevelRanking
from sgl_apr.methods.task import ValuedSearchTask
from sgl_apr.methods.tree_search import SearchNode
from tests.support import virtual_time


class Words(ValuedSearchTask[str, str]):
    """Words of three letters, letter by letter. They are worth what the script says; those that end with x are answers."""

    name, max_tokens, step_tokens, max_steps = "words", 10, 20, 3

    def initial_state(self, problem: str) -> str:
        return ""

    def proposal_prompt(self, state: str) -> Prompt:
        return Prompt(f"next of {state!r}: ", tokens=self.step_tokens)

    def expand(self, state: str, text: str) -> Sequence[str]:
        return [state + letter for letter in text if letter.isalpha()]

    def solution(self, state: str) -> str | None:
        return state if state.endswith("x") and len(state) == 3 else None

    def evaluate(self, state: str) -> Prompt | float:
        return Prompt(f"worth of {state!r}: ", tokens=4)

    def value(self, state: str, completion: Completion) -> float:
        return float(completion.text)


def subject(prompt: str) -> tuple[str, str]:
    what, _, rest = prompt.partition(" of ")
    return what, rest.split("'")[1]


def seeded(request: apr.Request, prompt: str) -> str:
    """Like a model: what it writes depends on the prompt and the seed alone."""
    what, _ = subject(prompt)
    draw = random.Random(f"{prompt}{request.sampling['sampling_seed']}")
    if what == "next":
        return "".join(draw.sample("abcdex", 3))
    return str(draw.randint(0, 9))


def search(
    name: str, script: Callable[[apr.Request, str], Any] = seeded, **options: Any
) -> tuple[MethodResult, Counter[str], apr.ScriptedEngine]:
    engine = apr.ScriptedEngine(script)
    options = {"seed": 0, "breadth": 2, **options}
    result = asyncio.run(method(name)(engine, "words", task=Words(engine), **options))
    assert not engine.active
    assert apr.Trajectory.from_json(result.trajectory.to_json()) == result.trajectory
    return result, Counter(bytes(r.input_ids).decode() for r in engine.requests), engine


@pytest.mark.parametrize("seed", range(5))
def test_the_tree_is_that_of_tree_of_thoughts(seed: int):
    plain, asked, _ = search("tree_of_thoughts", seed=seed)
    speculative, asked_too, _ = search("spex", seed=seed)
    assert (speculative.answer, speculative.score) == (plain.answer, plain.score)
    assert asked <= asked_too
    more = asked_too - asked
    assert all(prompt.startswith("next") for prompt in more)
    assert more.total() <= 3 * 2 * 5  # proposals, levels, speculation
    without, asked_without, _ = search("spex", seed=seed, speculation=0)
    assert (without.answer, asked_without) == (plain.answer, asked)
    assert without.label == "spex-style"


VALUES = {"a": 9, "b": 8, "c": 7, "d": 1}


def slow_judge(request: apr.Request, prompt: str) -> apr.Reply:
    """The values of d take long; nothing else does."""
    what, state = subject(prompt)
    if what == "next":
        return apr.Reply("abcd" if not state else "x", delay=0.1 if state else 0.0)
    return apr.Reply(str(VALUES.get(state, 5)), delay=0.2 if state == "d" else 0.0)


def test_likely_winners_do_not_wait_for_the_last_value():
    def seconds(name: str) -> float:
        engine = apr.ScriptedEngine(slow_judge)
        bound = {"speculation": 2} if name == "spex" else {}
        options = {"seed": 0, "breadth": 2, "proposals": 1, "evaluations": 1, **bound}
        result, took = virtual_time.run(method(name)(engine, "words", task=Words(engine), **options))
        assert result.answer == "axx"
        asked = {bytes(request.input_ids).decode() for request in engine.requests}
        assert not asked & {"next of 'c': ", "next of 'd': "}
        return took

    assert seconds("spex") < seconds("tree_of_thoughts") - 0.1  # the time of an expansion


def test_what_is_expanded_in_vain_is_cut_and_counted():
    def misleading(request: apr.Request, prompt: str) -> apr.Reply:
        """c and d look best until the values of a and b arrive."""
        what, state = subject(prompt)
        if what == "next":
            return apr.Reply("abcd" if not state else "x" + "." * 19, delay=0.01)
        return apr.Reply(str({"a": 9, "b": 8}.get(state, 5)), delay=0.05 if state in ("a", "b") else 0.0)

    result, asked, _ = search("spex", misleading, proposals=1, evaluations=1)
    assert (result.answer, result.score) == ("axx", 5.0)
    lost = [s for s in ("c", "d") if asked[f"next of {s!r}: "]]
    assert lost
    assert result.label.startswith(f"spex-style, {len(lost)} of its expansions in vain (")
    tokens = int(result.label.rpartition("(")[2].split()[0])
    assert 0 < tokens < 20 * len(lost)
    assert "speculation" in {limit.limit for limit in result.trajectory.limits}
    plain, _, _ = search("tree_of_thoughts", misleading, proposals=1, evaluations=1)
    assert result.metrics.decoded_tokens == plain.metrics.decoded_tokens + tokens


def ranking(values: dict[str, float | None], breadth: int = 2, parents: int = 1) -> LevelRanking:
    """A level whose first parent has these children, with the values that are known."""
    level = LevelRanking([str(k) for k in range(parents)], breadth)
    level.children["0"] = [SearchNode(state) for state in values]
    known = {state: SearchNode(state, value=value) for state, value in values.items() if value is not None}
    level.values.update(known)
    return level


def test_states_are_ranked_by_what_is_known_of_them():
    def order(*args: Any) -> str:
        return "".join(node.state for node in ranking(*args).by_expected_rank())

    assert order({"a": None, "b": None, "c": None}) == "abc"  # nothing is known: in order
    assert order({"a": 0.0, "b": 1.0, "c": 1.0}) == "bc"  # a cannot be kept
    assert order({"a": 0.0, "b": None, "c": 1.0}) == "cba"  # b may be as good as c, or as bad as a
    assert order({"a": 1.0, "b": 0.5, "c": None, "d": 0.0}, 3) == "abcd"
    assert order({"a": 0.5, "b": 0.5, "c": 0.5}) == "abc"
    assert order({}) == ""


def test_a_state_is_lost_once_enough_others_have_higher_values():
    level = ranking({"a": 1.0, "b": 0.5, "c": 0.5, "d": None}, breadth=2, parents=2)
    assert not level.is_lost("b"), "one is better"
    level.values["d"] = SearchNode("d", value=0.75)
    assert level.is_lost("b")
    assert level.is_lost("c")
    assert not level.is_lost("d")
    assert not level.is_lost("unknown")


def test_speculation_is_bounded():
    def equal(request: apr.Request, prompt: str) -> apr.Reply:
        what, state = subject(prompt)
        if what == "next":
            return apr.Reply("abcde" if len(state) < 2 else "x", delay=0.01)
        return apr.Reply("5", delay=0.001 * (1 + "abcde".index(state[-1])) if state[-1] != "x" else 0)

    for speculation in (0, 1, 3):
        result, asked, _ = search(
            "spex", equal, breadth=1, proposals=1, evaluations=1, speculation=speculation
        )
        lost = sum(asked.values()) - sum(
            search("tree_of_thoughts", equal, breadth=1, proposals=1, evaluations=1)[1].values()
        )
        assert lost <= 2 * speculation
        assert result.metrics.total > 0


def test_a_failed_value_and_a_failed_expansion_cost_their_state():
    def failing(request: apr.Request, prompt: str) -> Any:
        what, state = subject(prompt)
        if (what, state) in (("worth", "a"), ("next", "b")):
            return apr.Reply("9", error=apr.EngineError("broken", 400))
        return slow_judge(request, prompt)

    result, _, _ = search("spex", failing, breadth=3, proposals=1, evaluations=1)
    plain, _, _ = search("tree_of_thoughts", failing, breadth=3, proposals=1, evaluations=1)
    assert (result.answer, result.score) == (plain.answer, plain.score)
    with pytest.raises(apr.EngineError, match="broken"):
        search("spex", failing, breadth=3, on_branch_failure="raise")


def test_a_small_budget_and_wrong_options():
    result, _, _ = search("spex", budget=apr.Budget(tokens=120))
    assert result.metrics.total <= 120
    for options, message in (
        ({"breadth": 0}, "breadth=0"),
        ({"speculation": -1}, "speculation=-1, expected 0 or more"),
    ):
        with pytest.raises(apr.AprError, match=message):
            search("spex", **options)
