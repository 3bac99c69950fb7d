"""Trajectories with calls of tools: what is their answer, their context and their cost, and what is an error."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.trajectory import from_dataset, to_dataset
from sgl_apr.trajectory.tool_calls import called_tools
from tests.support.tool_trajectories import CALL, CUT, result_of, tool_trajectory

TOOLED = tool_trajectory("threadweaver")


def trunk(*pieces: apr.Span, **more: Any) -> apr.Trajectory:
    """A trunk that consists of these spans, each after the one before it."""
    spans = tuple(replace(span, parents=(i - 1,) if i else ()) for i, span in enumerate(pieces))
    return apr.Trajectory(spans, "threadweaver", **more)


def span(role: Any, text: str, label: str = "", **more: Any) -> apr.Span:
    origin = {"prompt": "prompt", "observation": "injected"}.get(role, "decoded")
    return apr.Span(role, origin, text, tuple(text.encode()), (), (), label, **more)


PROMPT, LOOK = span("prompt", "Q: "), span("text", "Let me look. ", finish="stop")
ASK, TELL = span("call", CALL, "a", finish="stop"), span("observation", "<r>3</r>", "a")
CALL_A = apr.ToolCall("a", (), "search", "{}", "3", "ok", 1.0, 1.5)


def test_the_answer_follows_the_last_result():
    calls = (CALL_A,)
    assert trunk(PROMPT, LOOK, ASK, TELL, span("text", " It is 3."), tool_calls=calls).answer == "It is 3."
    assert trunk(PROMPT, LOOK, ASK, TELL, tool_calls=calls).answer == ""
    assert TOOLED.answer == "The answer is 4."
    assert [TOOLED.spans[i].text.strip() for i in TOOLED.answer_spans] == ["The answer is 4."]


def test_the_text_ends_with_the_answer():
    """Also if a call was cut, after which the trunk continues or ends."""
    cut = span("call", CUT, "a", finish="length")
    calls = (replace(CALL_A, outcome="length"),)
    trajectory = trunk(PROMPT, span("text", "Hm. "), cut, span("text", " It is 3."), tool_calls=calls)
    assert (trajectory.answer, trajectory.text) == ("It is 3.", f"Hm. {CUT} It is 3.")
    trajectory = trunk(PROMPT, span("text", "It is 3. "), cut, tool_calls=calls)
    assert (trajectory.answer, trajectory.finish) == ("", "length")
    assert trajectory.text == f"It is 3. {CUT}", "the text has all that was decoded"


def test_a_call_without_a_result_is_not_in_the_context():
    cut = span("call", CUT, "b", finish="length")
    calls = (CALL_A, replace(CALL_A, id="b", outcome="length"))
    trajectory = trunk(PROMPT, LOOK, ASK, TELL, span("text", "So "), cut, tool_calls=calls)
    assert bytes(trajectory.context_ids).decode() == f"Q: {LOOK.text}{CALL}{TELL.text}So "
    no_room = trunk(PROMPT, LOOK, ASK, tool_calls=(replace(CALL_A, outcome="length"),))
    assert bytes(no_room.context_ids).decode() == f"Q: {LOOK.text}", "its result had no room"
    complete = trunk(PROMPT, LOOK, ASK, TELL, tool_calls=calls)
    assert bytes(complete.context_ids).decode() == f"Q: {LOOK.text}{CALL}{TELL.text}"


def test_branches_have_calls_and_results_in_their_text():
    first, second = TOOLED.blocks[0].branches
    assert first.text.count(CALL) == 2
    assert result_of("call_1.1_2") in first.text
    assert second.text.count(CALL) == 1
    assert second.text.endswith(CUT)
    assert (first.finish, second.finish) == ("stop", "length")
    assert [b.outline for b in (first, second)] == ["x < y", "and <b>"]
    assert TOOLED.blocks[0].conclusion == "both"
    assert len(TOOLED.blocks[0].branches) == 2, "a call is no branch"


def test_the_calls_of_a_span():
    by_id = {call.id: call for call in TOOLED.tool_calls}
    names = [[c.id for c in called_tools(s, by_id)] for s in TOOLED.spans if s.role == "call"]
    assert names == [["call_trunk_1"], ["call_1.1_1", "call_1.1_2"], ["call_1.2_1"], ["call_1.2_2"]]
    assert called_tools(replace(TOOLED.spans[0], label="call_trunk_1"), by_id) == [], "a prompt has no calls"
    assert called_tools(span("call", "", "call_trunk_1 gone"), by_id) == [by_id["call_trunk_1"]]


def test_metrics():
    m, plain = TOOLED.metrics(), apr.dialect("threadweaver").parse(TOOLED.text).blocks
    assert (m.tool_calls, m.tool_errors) == (5, 2), "one failed, one was cut"
    assert m.tool_s == pytest.approx(2 + 1 + 1 + 1)
    assert m.critical_tool_s == pytest.approx(2 + 1.125), (
        "two at once count once, and branches run in parallel"
    )
    assert (m.blocks, m.branches) == (1, 2) == (len(plain), len(plain[0].branches))
    reply = [s for s in TOOLED.spans if s.origin != "prompt"]
    assert m.total == sum(s.tokens for s in reply)
    assert m.critical_path < m.total
    without = replace(TOOLED, tool_calls=()).metrics()
    assert (without.tool_calls, without.tool_s, without.critical_tool_s) == (0, 0.0, 0.0)
    assert without.critical_path == m.critical_path, "seconds are no tokens"


def test_seconds_of_tools_add_up_along_a_chain():
    b = replace(CALL_A, id="b", started=2.0, ended=4.0)
    pieces = [LOOK, ASK, TELL, LOOK, replace(ASK, label="b"), replace(TELL, label="b")]
    assert trunk(*pieces, tool_calls=(CALL_A, b)).metrics().critical_tool_s == pytest.approx(2.5)


def test_a_round_trip():
    assert apr.Trajectory.from_json(TOOLED.to_json()) == TOOLED
    assert from_dataset(to_dataset([TOOLED])) == [TOOLED]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"id": "call_trunk_1"},
            r"tool_calls\[1\].id: expected an id that no other call has, found 'call_trunk_1'",
        ),
        ({"id": "a b"}, r"tool_calls\[1\].id: expected an id without blanks, found 'a b'"),
        ({"id": ""}, r"tool_calls\[1\].id: expected an id without blanks, found ''"),
        (
            {"id": "other"},
            r"spans\[9\].label: expected the id of a call of the trajectory, found 'call_1.1_1'",
        ),
        (
            {"path": [1]},
            r"tool_calls\[1\].path: expected the path of the trunk or of a branch, found \[1\]",
        ),
        ({"started": -1.0}, r"tool_calls\[1\].started: expected 0 or more, found -1.0"),
        (
            {"started": 3.0, "ended": 2.0},
            r"tool_calls\[1\].ended: expected 3.0 or more, when it started, found 2.0",
        ),
        ({"outcome": "late"}, r"tool_calls\[1\].outcome: expected ok or error .* found 'late'"),
    ],
)
def test_a_wrong_call_is_an_error(change: dict[str, Any], message: str):
    data = json.loads(TOOLED.to_json())
    data["tool_calls"][1] |= change
    with pytest.raises(apr.TraceError, match=message):
        apr.Trajectory.from_dict(data)


def test_positions_of_a_joined_trajectory_with_tools():
    joined = tool_trajectory("multiverse", cut=False)
    joined = replace(joined, joins=tuple(apr.JoinRecord(block.path, "kv") for block in joined.blocks))
    causality = apr.causality(joined)
    assert len(causality.token_ids) == sum(s.tokens for s in joined.spans)
    assert max(causality.positions) + 1 == joined.metrics().critical_path + joined.spans[0].tokens
    with pytest.raises(apr.AprError, match="no one order"):
        apr.causality(tool_trajectory("multiverse"))
