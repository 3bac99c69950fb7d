"""Rewriting sequential traces with forks: the plan, the filters, and many traces through a real endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.training.rewrite import rewriter as rewriting
from sgl_apr.training.rewrite.pipeline import (
    ChatJsonModel,
    RewriteStatistics,
    read_trajectories,
    rewrite_statistics,
    rewrite_traces,
)
from sgl_apr.training.rewrite.rewriter import ReasoningStep, RejectedTrace, parallelize, plan_forks
from sgl_apr.trajectory.trace_files import TextRecord

TRACE = """\
We need the area of the yard.
The first bed is 3 by 4, which is 12.
So its half is 6.
The second bed is 2 by 5, which is 10.
The path is 1 by 7, which is 7.
Together that is 6 + 10 + 7 = 23.
"""


class Scripted:
    """Answers like a model that understands the trace."""

    def __init__(
        self, begins=(True,) * 6, needs=((), (1,), (2,), (1,), (1,), (3, 4, 5)), text: str | None = None
    ):
        self.begins, self.needs, self.text, self.asked = begins, needs, text, []

    async def __call__(self, prompt: str, schema: Mapping[str, Any]) -> str:
        self.asked.append(prompt)
        (name,) = schema["required"]
        body = prompt.partition("\n\n")[2]
        answers = {
            "begins": self.begins,
            "needs": self.needs,
            "text": self.text or body,
            "outline": body.split(".")[0],
        }
        return json.dumps({name: answers[name]})


def made(
    name: str = "threadweaver", ask: Scripted | None = None, trace: str = TRACE, **more
) -> apr.Trajectory:
    return asyncio.run(parallelize(trace, ask or Scripted(), apr.dialect(name), **more))


@pytest.mark.parametrize(
    ("needs", "plan"),
    [
        (((), (0,), (1,), (0,), (0,), (2, 3, 4)), [0, [[1, 2], [3], [4]], 5]),
        (((), (), (1,), (), (), (2, 3, 4)), [[[0], [1, 2], [3], [4]], 5]),
        (((), (), (0, 1), (), ()), [[[0], [1]], [[2], [3]], 4]),
        (((), (0,), (1,)), [0, 1, 2]),
        (((), ()), [0, 1]),
        (((), (), ()), [[[0], [1]], 2]),
    ],
)
def test_independent_steps_fork(needs, plan):
    steps = [ReasoningStep(f"{k}", frozenset(own)) for k, own in enumerate(needs)]
    assert plan_forks(steps) == plan


def test_a_fork_starts_at_the_first_independent_step():
    """All steps need the first line: it comes before the fork, so the branches see it."""
    trajectory = made()
    apr.dialect("threadweaver").validate(trajectory.text)
    (block,) = trajectory.blocks
    assert [b.text.strip().splitlines() for b in block.branches] == [
        TRACE.splitlines()[1:3],
        TRACE.splitlines()[3:4],
        TRACE.splitlines()[4:5],
    ]
    assert trajectory.text.startswith(TRACE.splitlines()[0])
    assert trajectory.answer.strip() == TRACE.splitlines()[-1]


@pytest.mark.parametrize("name", ["threadweaver", "multiverse", "npr", "parallel_r1"])
def test_every_dialect_that_can_express_it(name: str):
    dialect = apr.dialect(name)
    trajectory = made(name, tokenizer=apr.ByteTokenizer(dialect.tags))
    dialect.validate(trajectory.text)
    assert len(trajectory.blocks[0].branches) == 3
    assert trajectory.metrics().acceleration > 0


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (Scripted(needs=((), (1,), (2,), (3,), (4,), (5,))), "no independent parts"),
        (Scripted(needs=((), (1,), (2,), (1,), (1,))), "an answer does not follow its schema"),
        (Scripted(needs=((), (1,), (9,), (1,), (1,), ())), "an answer does not follow its schema"),
        (Scripted(needs=5), "an answer does not follow its schema"),
        (Scripted(begins=(True,) * 5), "an answer does not follow its schema"),
        (Scripted(text="<Parallel>"), "not in the dialect"),
        (Scripted(text=" "), "an answer does not follow its schema"),
    ],
)
def test_a_rejected_trace_has_a_reason(ask: Scripted, reason: str):
    with pytest.raises(RejectedTrace) as caught:
        made(ask=ask)
    assert caught.value.reason == reason


def test_a_trace_too_wide_or_too_short_is_rejected():
    with pytest.raises(RejectedTrace, match="too wide"):
        made(width=2)
    with pytest.raises(RejectedTrace, match="lines"):
        made(trace="One line.")
    with pytest.raises(apr.AprError, match="awaited"):
        made("spawn")


def test_traces_are_counted_and_none_is_rewritten_twice(tmp_path: Path):
    class Sometimes(Scripted):
        async def __call__(self, prompt, schema):
            if "broken" in prompt:
                raise apr.EngineError("down")
            if "chain" in prompt and "needs" in schema["required"]:
                return json.dumps({"needs": [[], [1], [2], [3], [4], [5]]})
            return await super().__call__(prompt, schema)

    traces = [TextRecord("a", TRACE, "How large is it? "), TextRecord("b", TRACE.replace("yard", "chain"))]
    traces += [TextRecord("c", TRACE.replace("yard", "broken"))]
    dialect, out, ask = apr.dialect("npr"), tmp_path / "out.jsonl", Sometimes()
    tokenizer = apr.ByteTokenizer(dialect.tags)
    with pytest.raises(apr.EngineError, match="down"):
        asyncio.run(rewrite_traces(traces, ask, dialect, out, tokenizer=tokenizer))
    found = rewrite_statistics(out)
    assert (found.accepted, found.rejected) == (1, {"no independent parts": 1})
    assert (found.blocks, found.width) == (1, 3)
    assert found.parallelism > 1
    asked = len(ask.asked)
    with out.open("a") as file:
        file.write('{"id": "half')
    traces[2] = TextRecord("c", TRACE)
    assert asyncio.run(rewrite_traces(traces, ask, dialect, out, tokenizer=tokenizer)).accepted == 2
    assert 0 < len(ask.asked) - asked < asked
    first = next(read_trajectories(out))
    assert first.prompt == "How large is it? "
    assert "".join(s.text for s in first.spans) == first.prompt + first.text


@pytest.mark.server
@pytest.mark.slow
def test_through_a_real_endpoint(server, tmp_path: Path):
    """A random model under the schemas: answers follow their schema up to the length limit, and all traces are counted."""
    traces = [TextRecord(f"{k}", TRACE) for k in range(8)]
    ask = ChatJsonModel(f"{server.url}/v1", max_tokens=700, temperature=1.0)
    out = tmp_path / "out.jsonl"
    found = asyncio.run(rewrite_traces(traces, ask, apr.dialect("threadweaver"), out))
    assert isinstance(found, RewriteStatistics)
    assert found.accepted + sum(found.rejected.values()) == 8
    steps = asyncio.run(
        rewriting.split_steps(TRACE, ChatJsonModel(f"{server.url}/v1", max_tokens=700, temperature=1.0))
    )
    assert "".join(step.text for step in steps) == TRACE.strip()
    for trajectory in read_trajectories(out):
        apr.dialect("threadweaver").validate(trajectory.text)


def test_an_unreachable_endpoint_is_an_error(tmp_path: Path):
    ask = ChatJsonModel("http://127.0.0.1:9/v1")
    ask.client = ask.client.with_options(max_retries=0)
    with pytest.raises(apr.EngineError, match="did not answer"):
        asyncio.run(rewrite_traces([TextRecord("a", TRACE)], ask, apr.dialect("npr"), tmp_path / "out.jsonl"))
