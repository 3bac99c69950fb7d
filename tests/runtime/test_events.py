"""Events: their order, and that the trajectory can be rebuilt from them and from nothing else."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import aclosing

import pytest

import sgl_apr as apr
from sgl_apr.formats.dialects import dialect_names
from tests.runtime.test_loop import AT_ONCE, BOOM, scripted
from tests.runtime.tools.scripted_tools import FORK, JOINED, call, engine
from tests.support.masked_sampler import SampledEngine, masked

every_dialect = pytest.mark.parametrize("name", dialect_names())


def listen(engine, **options) -> tuple[apr.Trajectory, list]:
    events: list = []
    return asyncio.run(apr.areason(engine, "Q: ", on_event=events.append, **options)), events


@every_dialect
@pytest.mark.parametrize("depth", [1, 3])
def test_the_trajectory_is_rebuilt_from_its_events(name: str, depth: int):
    dialect = apr.dialect(name)
    budget = apr.Budget(
        tokens=2500, width=3 if dialect.max_width > 2 else 2, depth=min(depth, dialect.max_depth)
    )
    for seed in range(3):
        engine = SampledEngine(masked(name), seed=seed)
        trajectory, events = listen(engine, dialect=name, budget=budget, mode="parallel")
        assert apr.rebuild(events) == trajectory
        check_order(trajectory, events)
        with pytest.raises(apr.AprError, match="Done is missing"):
            apr.rebuild(events[:-1])


def check_order(trajectory: apr.Trajectory, events: list) -> None:
    """What `sgl_apr.runtime.events` says of their order."""
    forked, ended, joined = set(), set(), set()
    heard: dict = defaultdict(str)
    written: dict = defaultdict(str)
    assert isinstance(events[0], apr.SpanFinished)
    assert events[0].span.role == "prompt"
    assert isinstance(events[-1], apr.Done)
    assert sum(isinstance(e, apr.Done) for e in events) == 1
    for event in events[1:]:
        match event:
            case apr.Forked(path, branches, first):
                forked |= {(*path, first + k) for k in range(len(branches))}
            case apr.Delta(path, text):
                assert not path or path in forked
                assert path not in joined
                heard[path] += text
            case apr.SpanFinished(_, span):
                assert not span.path or span.path in forked
                assert span.path not in ended or span.role == "result"
                written[span.path] += span.text
                assert heard[span.path].startswith(written[span.path])
            case apr.BranchEnded(path, outcome):
                assert path not in ended
                ended.add(path)
                assert outcome == next(
                    b.outcome for x in trajectory.blocks for b in x.branches if b.path == path
                )
            case apr.Joined(path, branches):
                assert {(*path, k) for k in branches} <= ended
                joined |= {(*path, k) for k in branches}
    assert forked == ended == joined == {b.path for x in trajectory.blocks for b in x.branches}
    assert heard == written
    for path, text in heard.items():
        assert text == "".join(s.text for s in trajectory.reply if s.path == path)


def test_what_is_retried_is_void():
    for failed in ("skip", "retry"):
        _, events = listen(scripted(branch_1=BOOM), retry=AT_ONCE, on_branch_failure=failed)
        heard: dict = defaultdict(str)
        for event in events:
            if isinstance(event, apr.Delta):
                heard[event.path] += event.text
            if isinstance(event, apr.TextRetracted):
                text = heard[event.path]
                heard[event.path] = "" if event.chars is None else text[: len(text) - event.chars]
        assert heard[(1, 1)] == "<Thread>\n1: (failed)</Thread>"
        assert any(isinstance(e, apr.TextRetracted) for e in events)


def test_a_stream_is_its_events():
    async def go() -> list:
        return [event async for event in apr.stream(scripted(), "Q: ", budget=apr.Budget(width=3))]

    events = asyncio.run(go())
    assert apr.rebuild(events).answer == "Done."


def test_a_stream_raises_behind_its_events():
    async def go() -> None:
        async for event in apr.stream(scripted(after=BOOM), "Q: ", retry=AT_ONCE):
            events.append(event)

    events: list = []
    with pytest.raises(apr.EngineError, match="boom"):
        asyncio.run(go())
    assert any(isinstance(e, apr.Joined) for e in events)


def test_leaving_a_stream_cancels():
    engine = scripted(branch_2=apr.Reply(" forever" * 500, delay=0.02))

    async def go() -> None:
        async with aclosing(apr.stream(engine, "Q: ")) as events:
            async for event in events:
                if isinstance(event, apr.Delta) and event.path == (1, 2):
                    break
        assert not engine.active
        assert len(engine.aborted) == 1

    asyncio.run(go())


def test_the_order_of_calls_of_tools():
    def search(query: str) -> str:
        """Search."""
        return f"found {query}"

    script = {
        "Q: ": "Hm. " + call("search", query="trunk"),
        "found trunk\n</tool_response>\n": "So. " + FORK,
        "1:": " one" + call("search", query="x") + "\n" + call("search", query="y"),
        "2:": " two" + call("search", query="z" * 900),
        "</tool_response>\n": "\n</Thread>",
        "\n": JOINED,
    }
    budget = apr.Budget(tokens=4000, branch_tokens=300)
    _, events = listen(engine(script), tools=[search], tool_call_parser="qwen25", budget=budget)
    kinds: dict = defaultdict(list)
    for event in events:
        match event:
            case apr.ToolCalled(_, name):
                kinds[name].append("called")
            case apr.ToolReturned(_, returned):
                kinds[returned.id].append("returned")
            case apr.SpanFinished(_, span) if span.role in ("call", "observation"):
                for name in span.label.split():
                    kinds[name].append(span.role)
    complete = ["call", "called", "returned", "observation"]
    assert kinds == {
        "call_1": complete,
        "call_1.1_1": complete,
        "call_1.1_2": complete,
        "call_1.2_1": ["call", "returned"],
    }
    assert [e.index for e in events if isinstance(e, apr.ToolReturned)] == [0, 1, 2, 3]
