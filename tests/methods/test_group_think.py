"""Group Think by chunks: what each agent sees and how late, when the method ends, and who votes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.methods.prompt import Prompt
from sgl_apr.methods.registry import MethodResult, method
from sgl_apr.methods.task import CollaborativeTask, Inapplicable, Task


class Talk(CollaborativeTask[str]):
    """What a thinker sees: `Q[what others write][own>`. An answer follows "="."""

    name, max_tokens = "talk", 20

    def shared_context_prompt(
        self, problem: str, own: str, others: Sequence[str], past: str = ""
    ) -> tuple[str, Prompt]:
        return f"{problem}[{'/'.join(others)}][{own}>", Prompt()

    def answer(self, text: str) -> str:
        return text.partition("=")[2]


def speaker(*texts: str) -> Any:
    """Thinker k says texts[k], whatever the others do; it knows who it is by the order of the requests of a round."""
    begun = iter(range(len(texts)))
    who: dict[str, int] = {}

    def script(request: apr.Request, prompt: str) -> apr.Reply:
        own = re.search(r"\[([^\[]*)>$", prompt)[1]  # type: ignore[index]
        k = next(begun) if not own else who[own]
        said = texts[k][len(own) :]
        who[own + said[: request.max_tokens]] = k
        return apr.Reply(said, delay=0.001)

    return script


def think(script: Any, **options: Any) -> tuple[MethodResult, list[str], apr.ScriptedEngine]:
    engine = apr.ScriptedEngine(script)
    options = {"thinkers": 2, "chunk": 3, "seed": 0, **options}
    found = asyncio.run(method("group_think")(engine, "Q", task=Talk(engine), **options))
    assert not engine.active
    return found, [bytes(r.input_ids).decode() for r in engine.requests], engine


def test_each_sees_the_others_up_to_the_last_chunk():
    found, prompts, _ = think(speaker("abcdef=1", "uvwxy=1"))
    assert prompts == [
        "Q[][>", "Q[][>",
        "Q[uvw][abc>", "Q[abc][uvw>",
        "Q[uvwxy=][abcdef>", "Q[abcdef][uvwxy=>",
    ]  # fmt: skip
    assert (found.answer, found.score, found.label) == ("1", 1.0, "groupthink-chunk(3)")


def test_three_see_two_in_their_order():
    _, prompts, _ = think(speaker("aaaaaa=1", "bbbbbb=1", "cccccc=1"), thinkers=3)
    assert prompts[3:6] == ["Q[bbb/ccc][aaa>", "Q[aaa/ccc][bbb>", "Q[aaa/bbb][ccc>"]


def test_it_ends_when_more_than_half_have_an_answer():
    found, prompts, _ = think(speaker("a=7", "b=7", "c" * 90), thinkers=3)
    assert (found.answer, found.score) == ("7", pytest.approx(2 / 3))
    assert len(prompts) == 3 + 3
    found, prompts, _ = think(speaker("a=7", "b=7", "c" * 9 + "=8"), thinkers=3, enough=3)
    assert found.answer == "7"
    assert len(prompts) == 3 + 3 + 1 + 1, "who has ended writes no more"


def test_unfinished_text_is_no_answer():
    found, *_ = think(speaker("=123456", "x=5", "y=5"), thinkers=3)
    assert found.answer == "5"
    found, *_ = think(speaker("=12345678", "=12945678"), budget=apr.Budget(tokens=6))
    assert found.answer == "12", "at the limit all that there is counts"


def test_agents_without_an_answer_have_no_vote():
    found, prompts, _ = think(speaker("no", "none", "c=4"), thinkers=3)
    assert (found.answer, found.score) == ("4", pytest.approx(1 / 3))
    assert len(prompts) == 5


def test_a_chunk_is_written_in_parallel_after_a_committed_prompt():
    script = speaker("abcdef", "uvwxyz")
    engine = apr.ScriptedEngine(script)
    most, decode = 0, engine.decode

    async def counted(request: apr.Request, on_tokens: Any = None) -> apr.Result:
        nonlocal most
        most = max(most, len(engine.active) + 1)
        return await decode(request, on_tokens)

    engine.decode = counted  # type: ignore[method-assign]
    found = asyncio.run(method("group_think")(engine, "Q", task=Talk(engine), thinkers=2, chunk=3))
    assert most == 2
    assert engine.commits[0] == tuple(b"Q[][>")
    calls = [c for c in found.trajectory.calls if c.cached_tokens is not None]
    assert all(c.cached_tokens >= c.shared_tokens - 1 for c in calls)
    assert found.metrics.total == 12, "what is read again is not counted"
    assert found.metrics.critical_path == 6
    texts = [span.text for span in found.trajectory.spans]
    seen = {texts[i] for i in found.trajectory.ancestors(texts.index("xyz"))}
    assert {"abc", "uvw", "xyz"} <= seen
    assert "def" not in seen, "that was written meanwhile"


@pytest.mark.parametrize("tokens", [1, 5, 7, 20])
def test_a_budget_is_kept(tokens: int):
    found, *_ = think(speaker("a" * 90, "b" * 90), budget=apr.Budget(tokens=tokens))
    assert found.metrics.total <= tokens
    assert {limit.limit for limit in found.trajectory.limits} == {"tokens"}


def test_a_failure_stays_with_its_thinker():
    talk = speaker("abcdef=1", "uvw=2")

    def broken(request: apr.Request, prompt: str) -> apr.Reply:
        return apr.Reply(error=apr.EngineError("broken", 400)) if "[abc>" in prompt else talk(request, prompt)

    found, prompts, _ = think(broken)
    assert found.answer == "2"
    assert prompts[-1] == "Q[abc][uvw>", "and what it had written stays"


def test_a_character_cut_by_a_chunk_is_not_shown_in_part():
    engine = apr.ScriptedEngine(lambda request, prompt: "")
    texts = iter([b"ab\xc3", b"cd"])

    def halves(request: apr.Request, on_tokens: Any = None) -> Any:
        engine.requests.append(request)

        async def result() -> apr.Result:
            ids = tuple(next(texts, b""))
            return apr.Result(ids, "length" if ids == tuple(b"ab\xc3") else "stop", len(request.input_ids), 0)

        return result()

    engine.decode = halves  # type: ignore[method-assign]
    asyncio.run(method("group_think")(engine, "Q", task=Talk(engine), thinkers=1, chunk=3))
    assert bytes(engine.requests[1].input_ids) == b"Q[][ab>"


def test_invalid_arguments_and_tasks_are_errors():
    for wrong in ({"thinkers": 0}, {"chunk": 0}):
        with pytest.raises(apr.AprError, match="expected at least 1"):
            think(speaker(""), **wrong)

    class Plain(Task[str]):
        name = "plain"

    engine = apr.ScriptedEngine(speaker(""))
    with pytest.raises(Inapplicable, match="plain cannot be thought about together"):
        asyncio.run(method("group_think")(engine, "Q", task=Plain(engine)))
