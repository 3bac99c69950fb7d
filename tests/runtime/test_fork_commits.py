"""When a fork sends a commit before its branches: only where the branches would compute many tokens several times."""

from __future__ import annotations

import asyncio

import pytest

import sgl_apr as apr
from sgl_apr.runtime.request_runner import MAX_RECOMPUTED_TOKENS

PROMPT = "What is left and right, and why? "


class CachingEngine(apr.ScriptedEngine):
    """Keeps what it has decoded in its cache, but for the last token, as SGLang does."""

    def __init__(self, script, dialect: apr.Dialect) -> None:
        super().__init__(script, apr.ByteTokenizer(dialect.tags))
        self.caches_output = True

    async def decode(self, request, on_tokens=None):
        result = await super().decode(request, on_tokens)
        self._cache[-1] = self._cache[-1][:-1]
        return result


def threadweaver(width: int) -> CachingEngine:
    """An engine that forks once into so many branches."""
    outlines = "".join(f"<Outline>{k}: part</Outline>\n" for k in range(1, width + 1))

    def script(_: apr.Request, prompt: str) -> str:
        if prompt.endswith(":"):
            return " one\n</Thread>"
        fork = f"<Parallel>\n<Outlines>\n{outlines}</Outlines>"
        return "</Parallel>\nDone." if prompt.endswith("</Thread>\n") else fork

    return CachingEngine(script, apr.dialect("threadweaver"))


def reason(engine: apr.ScriptedEngine, **options) -> apr.Trajectory:
    return asyncio.run(apr.areason(engine, PROMPT, **{"pacing": None, **options}))


@pytest.mark.parametrize("width", [2, 3, 17])
def test_few_tokens_are_computed_by_each_branch(width):
    engine = threadweaver(width)
    trajectory = reason(engine, dialect="threadweaver", budget={"tokens": 4096, "width": width})
    assert len(trajectory.blocks[0].branches) == width
    assert (engine.commits, engine.forks) == ([], [])
    header = len(engine.tokenizer.encode("<Thread>\n1:"))
    branches = [c for c in trajectory.calls if c.phase == "branch"]
    for call in branches[:9]:  # those with a number of one digit
        assert call.new_tokens == header + 2, "the last decoded token and the line break have no KV yet"
        assert call.cached_tokens == call.shared_tokens
    assert trajectory.metrics().reprefilled_tokens == sum(
        c.reprefilled_tokens for c in trajectory.calls if c.phase == "after"
    )


def test_many_tokens_are_committed_once():
    width = MAX_RECOMPUTED_TOKENS // 2 + 2  # each branch but one computes two tokens again
    engine = threadweaver(width)
    trajectory = reason(engine, dialect="threadweaver", budget={"tokens": 4096, "width": width})
    assert (len(engine.commits), engine.forks) == (1, [width])
    branches = [c for c in trajectory.calls if c.phase == "branch"]
    assert all(c.cached_tokens == c.shared_tokens for c in branches)
    assert branches[0].new_tokens == len(engine.tokenizer.encode("<Thread>\n1:"))


def test_a_prompt_that_nothing_has_computed_is_committed():
    """In ParaThinker a reply begins with its branches."""
    engine = CachingEngine(lambda _, prompt: "a" if prompt.endswith(">") else "b", apr.dialect("parathinker"))
    trajectory = reason(engine, dialect="parathinker", budget={"tokens": 400, "width": 3})
    assert len(trajectory.blocks[0].branches) == 3
    assert len(engine.commits) == 1


@pytest.mark.parametrize(("join", "commits"), [("text", 0), ("kv", 3)])
def test_what_joins_in_the_cache_is_committed(join, commits):
    """The prefix and both branches."""
    outlines = "".join(f"<Outline>\n{k}: part</Outline>\n" for k in (1, 2))

    def script(_: apr.Request, prompt: str) -> str:
        if prompt.endswith(":"):
            return " one</Path>"
        fork = f"<Parallel>\n<Goal>\n{outlines}</Goal>"
        return "c</Conclusion>\n</Parallel>Done." if prompt.endswith("<Conclusion>\n") else fork

    engine = CachingEngine(script, apr.dialect("multiverse"))
    engine.joins_kv = True
    trajectory = reason(engine, dialect="multiverse", join=join, budget={"tokens": 400, "width": 2})
    assert trajectory.answer == "Done."
    assert [j.by for j in trajectory.joins] == ["kv"] * (join == "kv")
    assert len(engine.commits) == commits


def test_an_engine_with_forks_of_its_own_commits():
    engine = threadweaver(2)
    engine.caches_output = False
    reason(engine, dialect="threadweaver", budget={"tokens": 400, "width": 2})
    assert (len(engine.commits), engine.forks) == (1, [2])


def test_a_branch_that_runs_while_its_sequence_continues():
    def script(_: apr.Request, prompt: str) -> str:
        if prompt.endswith("<async>"):
            return " one</async>"
        if prompt.endswith("</async>"):
            return " Done."
        return ' so<promise topic="t"/>' if prompt == PROMPT else " and<sync/>"

    engine = CachingEngine(script, apr.dialect("pasta"))
    trajectory = reason(engine, dialect="pasta", budget={"tokens": 400, "width": 2})
    assert trajectory.text == ' so<promise topic="t"/> and<sync/><async> one</async> Done.'
    assert engine.commits == []
    assert {(c.phase, c.new_tokens, c.reprefilled_tokens) for c in trajectory.calls} == {
        ("trunk", len(PROMPT), 0),
        ("branch", 2, 0),  # its header, and the last token of the trunk
        ("after", 1, 0),  # that token again
        ("after", 6, 1),  # the branch, and the last token before it, which counts as decoded
    }
