"""Tree of Thoughts against the paper: the prompts, what is kept, and backtracking."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import Inapplicable, Task, ValuedSearchTask, VotedSearchTask

WORTH = {"a": 1, "b": 3, "c": 2, "ba": 0, "bb": 5, "ca": 4, "aa": 1, "bbx": 1, "cax": 7}


class Letters(ValuedSearchTask[str, str], VotedSearchTask[str, str]):
    """Words of three letters, letter by letter; the last has to be x."""

    name, max_tokens, step_tokens, max_steps = "letters", 10, 4, 3

    def initial_state(self, problem: str) -> str:
        return ""

    def proposal_prompt(self, state: str) -> Prompt:
        return Prompt(f"next of {state!r}: ", tokens=self.step_tokens)

    def expand(self, state: str, text: str) -> Sequence[str]:
        return [state + letter for letter in text if letter.isalpha()]

    def solution(self, state: str) -> str | None:
        return state if state.endswith("x") else None

    def evaluate(self, state: str) -> Prompt | float:
        return Prompt(f"worth of {state!r}: ", tokens=2) if len(state) < 3 else float(WORTH.get(state, 0))

    def value(self, state: str, thought: Completion) -> float:
        return float(thought.text)

    def show(self, state: str) -> str:
        return state

    def vote_prompt(self, problem: str, texts: Sequence[str]) -> Prompt:
        return Prompt(f"best of {' '.join(texts)}: ", tokens=2)

    def choice(self, text: str, count: int) -> int | None:
        return int(text) if text.isdigit() and int(text) < count else None


STEPS = {"": "abc", "a": "a", "b": "ab", "c": "a", "bb": "x", "ca": "x", "aa": "z", "ba": "z"}


def script(request: apr.Request, prompt: str) -> str:
    what, _, rest = prompt.partition(" of ")
    if what == "next":
        return STEPS[rest.split("'")[1]]
    if what == "worth":
        return str(WORTH[rest.split("'")[1]])
    texts = rest.removesuffix(": ").split()
    return str(texts.index(max(texts, key=WORTH.__getitem__)))


def tree(**options: Any) -> tuple[MethodResult, Counter[str]]:
    """What it comes to, and how often each prompt was asked."""
    engine = apr.ScriptedEngine(options.pop("script", script))
    options = {"proposals": 2, "evaluations": 3, **options}
    found = asyncio.run(method("tree_of_thoughts")(engine, "words", task=Letters(engine), seed=0, **options))
    asked = Counter(bytes(r.input_ids).decode() for r in engine.requests)
    assert not engine.active
    return found, asked


def test_breadth_first_keeps_the_best_of_each_level():
    found, asked = tree(breadth=2)
    assert (found.answer, found.score, found.label) == ("cax", 7.0, "exact")
    assert asked == {
        "next of '': ": 2,
        **{f"worth of {s!r}: ": 3 for s in ("a", "b", "c")},
        **{f"next of {s!r}: ": 2 for s in ("b", "c")},  # the two best
        **{f"worth of {s!r}: ": 3 for s in ("ba", "bb", "ca")},
        **{f"next of {s!r}: ": 2 for s in ("bb", "ca")},
    }


def test_a_breadth_of_one_is_greedy():
    found, asked = tree(breadth=1)
    assert found.answer == "bbx"
    assert asked["next of 'c': "] == 0


def test_values_are_means():
    said = iter([0, 3, 3, *[1] * 100])

    def noisy(request: apr.Request, prompt: str) -> str:
        return f"{next(said)}" if prompt == "worth of 'a': " else script(request, prompt)

    _, asked = tree(breadth=1, script=noisy)
    assert asked["next of 'b': "] == 2  # worth 3, where one sample of a was 3 too, and its mean is 2


def test_depth_first_search_backtracks():
    found, asked = tree(search="dfs", threshold=3.0, proposals=1, evaluations=1)
    assert (found.answer, found.score) == ("", None)  # only b is worth more; what follows bb is not
    assert [asked[f"next of {s!r}: "] for s in ("a", "b", "c", "bb", "ca")] == [0, 0, 0, 0, 0]
    found, asked = tree(search="dfs", threshold=1.5, proposals=1, evaluations=1)
    assert found.answer == "cax"  # bbx is worth 1, and then it goes back to c
    order = [s for s in ("b", "bb", "c", "ca", "a", "ba") if asked[f"next of {s!r}: "]]
    assert order == ["b", "bb", "c", "ca"]


def test_votes_compare_a_level():
    found, asked = tree(breadth=1, select="vote", evaluations=5)
    assert found.answer == "bbx"
    assert asked["best of a b c: "] == 5
    assert asked["best of ba bb: "] == 5
    assert not any(prompt.startswith("worth") for prompt in asked)


def test_a_level_is_sampled_in_parallel_after_committed_prompts():
    engine = apr.ScriptedEngine(lambda request, prompt: apr.Reply(script(request, prompt), delay=0.005))
    most = 0
    decode = engine.decode

    async def counted(request: apr.Request, on_tokens: Any = None) -> apr.Result:
        nonlocal most
        most = max(most, len(engine.active) + 1)
        return await decode(request, on_tokens)

    engine.decode = counted  # type: ignore[method-assign]
    found = asyncio.run(
        method("tree_of_thoughts")(engine, "words", task=Letters(engine), breadth=3, proposals=3)
    )
    assert most == 12  # values of aa, ba, bb, ca
    calls = [c for c in found.trajectory.calls if c.cached_tokens is not None]
    assert all(c.cached_tokens >= c.shared_tokens - 1 for c in calls)
    assert found.metrics.critical_path < found.metrics.total / 2


def test_the_answer_follows_everything_that_led_to_it():
    found, _ = tree(breadth=2)
    spans = found.trajectory.spans
    last = max(i for i, s in enumerate(spans) if "'ca'" in s.text and s.text.startswith("next"))
    waited, seen = [last], set[int]()
    while waited:
        i = waited.pop()
        seen.add(i)
        waited += [*spans[i].parents, *spans[i].waits_for]
    texts = [spans[i].text for i in sorted(seen)]
    assert "worth of 'ca': " in texts
    assert "next of 'c': " in texts
    assert "next of '': " in texts
    assert "next of 'b': " not in texts


@pytest.mark.parametrize("tokens", [1, 20, 60, 120])
def test_a_budget_is_kept(tokens: int):
    found, _ = tree(breadth=2, budget=apr.Budget(tokens=tokens))
    assert found.metrics.total <= tokens
    assert found.trajectory.limits


def test_a_failure_stays_with_its_thought():
    def broken(request: apr.Request, prompt: str):
        failed = apr.Reply(error=apr.EngineError("broken", 400))
        return failed if prompt.startswith("next of 'b'") else script(request, prompt)

    found, _ = tree(breadth=2, script=broken)
    assert found.answer == "cax"


def test_invalid_arguments_and_tasks_are_errors():
    for wrong in ({"search": "best"}, {"select": "coin"}, {"search": "dfs", "select": "vote"}):
        with pytest.raises(apr.AprError, match="expected"):
            tree(**wrong)

    class Plain(Task[str]):
        name = "plain"

    engine = apr.ScriptedEngine(script)
    with pytest.raises(Inapplicable, match="plain cannot be solved step by step"):
        asyncio.run(method("tree_of_thoughts")(engine, "words", task=Plain(engine)))
