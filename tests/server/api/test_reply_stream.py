"""The deltas of a stream add up to the reply, in whatever order branches write, fail, and are cut."""

from __future__ import annotations

import asyncio
import random

import pytest

import sgl_apr as apr
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.runtime.options import ReasonOptions, make_options
from sgl_apr.server.api.openai.reply import (
    ReplyText,
    answer_start,
    answer_tokens,
    find_stop,
    split_reply,
    stop_prefix_chars,
)
from sgl_apr.server.api.openai.reply_order import ReplyOrder
from sgl_apr.server.api.openai.reply_stream import ReplyDelta, ReplyStream
from tests.runtime.test_loop import AT_ONCE, BOOM, scripted
from tests.runtime.tools.checked_tools import CALL_TAGS, plot, search
from tests.support.masked_sampler import Masked, SampledEngine, masked

STOPS: tuple[tuple[str, ...], ...] = ((), ("a",), ("ab", "c\n"), ("e", "\n"), ("zzz",))


class InterleavedEngine(SampledEngine):
    """Yields to other branches a random number of times before every token."""

    async def decode(self, request: apr.Request, on_tokens=None) -> apr.Result:
        tokens: list[int] = []
        result = await super().decode(request, tokens.extend)
        for token in tokens:
            for _ in range(self.random.randrange(3)):
                await asyncio.sleep(0)
            if on_tokens:
                on_tokens([token])
        return result


def run(engine, dialect: str, **options) -> tuple[ReasonOptions, list, apr.Trajectory]:
    events: list = []
    trajectory = asyncio.run(apr.areason(engine, "Q: ", dialect, on_event=events.append, **options))
    return make_options(dialect, **options), events, trajectory


def deltas_of(options: ReasonOptions, events: list, trajectory: apr.Trajectory, **how) -> list[ReplyDelta]:
    stream = ReplyStream(options, **how)
    deltas = [stream.add(event) for event in events] + [stream.finish(trajectory)]
    reply = split_reply(trajectory, **how)
    assert stream.is_stopped == reply.is_stopped
    assert "".join(delta.content for delta in deltas) == reply.content
    return deltas


def check(
    options: ReasonOptions, events: list, trajectory: apr.Trajectory, stop: tuple[str, ...] = ()
) -> ReplyText:
    """The deltas are the reply, for both forms of the content, and the reasoning of a stream comes first."""
    order = ReplyOrder(options)
    assert "".join(order.add(event)[1] for event in events) == trajectory.text
    for separate in (True, False):
        how = {"separate_reasoning": separate, "stop": stop}
        deltas, reply = deltas_of(options, events, trajectory, **how), split_reply(trajectory, **how)
        assert "".join(delta.reasoning for delta in deltas) == reply.reasoning
        kinds = [kind for d in deltas for kind, text in (("r", d.reasoning), ("c", d.content)) if text]
        assert kinds == sorted(kinds, reverse=True)
        rest = trajectory.text[len(reply.reasoning + reply.content) :]
        assert trajectory.text.startswith(reply.reasoning + reply.content)
        assert rest.startswith(reply.stop) if reply.stop else not rest
        assert (reply.stop is None) == (find_stop(trajectory.text[answer_start(trajectory) :], stop) is None)
    return reply


@pytest.mark.parametrize("name", dialect_names())
def test_deltas_add_up_in_every_dialect(name: str):
    dialect, chance = apr.dialect(name), random.Random(name)
    seen = set()
    for seed in range(3):
        options: dict = {
            "mode": "auto" if seed == 2 else "parallel",
            "budget": apr.Budget(tokens=400, depth=chance.randint(1, min(2, dialect.max_depth))),
            "max_blocks": chance.choice([None, 1, 2]),
        }
        if not dialect.asynchronous:
            options["policy"] = chance.choice([None, "first", "quorum:2"])
        result = run(InterleavedEngine(masked(name), seed), name, **options)
        check(*result, stop=chance.choice(STOPS))
        check(*result)
        seen.add(bool(result[2].blocks))
    assert True in seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["threadweaver", "spawn"])
def test_deltas_add_up_with_calls_of_tools(name: str):
    calls = 0
    for seed in range(3):
        options: dict = {
            "tools": [search, plot],
            "tool_call_parser": "qwen25",
            "tool_choice": "required" if seed else "auto",
            "budget": apr.Budget(tokens=700, width=3, tool_calls=6, tool_result_tokens=40),
        }
        result = run(InterleavedEngine(Masked((*apr.dialect(name).tags, *CALL_TAGS)), seed), name, **options)
        check(*result, stop=("a",))
        calls += len(result[2].tool_calls)
    assert calls


def test_an_answer_is_streamed_where_no_fork_can_follow():
    for options, live in (({"max_blocks": 1}, True), ({"budget": apr.Budget(blocks=1)}, True), ({}, False)):
        result = run(scripted(), "threadweaver", **options)
        deltas = [d for d in deltas_of(*result, separate_reasoning=True) if d.content]
        assert (len(deltas) > 1) == live, "of `Done.`, a byte is a token"
    result = run(scripted(), "threadweaver", mode="auto", max_blocks=1, constrain=False)
    deltas = [d for d in deltas_of(*result, separate_reasoning=True) if d.content]
    assert len(deltas) == 1, "without a grammar anything may follow"


def test_a_reply_without_a_fork_is_content_from_its_first_character():
    engine = scripted(trunk=" \n An answer.")
    options, events, trajectory = run(engine, "threadweaver", mode="sequential")
    deltas = [d for d in deltas_of(options, events, trajectory, separate_reasoning=True) if d]
    assert "".join(d.content for d in deltas) == trajectory.text == " \n An answer."
    assert len(deltas) > 5
    assert answer_tokens(trajectory) == len(trajectory.token_ids)


@pytest.mark.parametrize("failed", ["skip", "retry"])
@pytest.mark.parametrize("separate", [True, False])
def test_a_branch_that_fails_costs_no_content(failed: str, separate: bool):
    result = run(scripted(branch_1=BOOM), "threadweaver", retry=AT_ONCE, on_branch_failure=failed)
    assert any(isinstance(event, apr.TextRetracted) for event in result[1])
    deltas_of(*result, separate_reasoning=separate)


def test_stop_strings_are_found_across_deltas():
    assert find_stop("abcabd", ("abd", "bc")) == 1
    assert find_stop("abc", ()) is None
    assert stop_prefix_chars("xyab", ("abc", "b")) == 2
    assert stop_prefix_chars("xyab", ("xyz",)) == 0
    for size in range(1, 6):
        stop = "Done."[:size]
        options, events, trajectory = run(scripted(), "threadweaver", max_blocks=1)
        reply = check(options, events, trajectory, (stop,))
        assert reply.stop == stop
        assert split_reply(trajectory, separate_reasoning=True, stop=(stop,)).content == ""


def test_stop_strings_act_on_the_answer_alone():
    options, events, trajectory = run(scripted(), "threadweaver")
    assert "<Thread>" in trajectory.text
    assert check(options, events, trajectory, ("<Thread>", "</Parallel>")).stop is None
