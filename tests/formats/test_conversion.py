"""Conversion to another format: what the target can express is kept, anything else is an error."""

from __future__ import annotations

import pytest

import sgl_apr as apr
from tests.support.example_documents import DOCUMENTS
from tests.support.threadweaver_traces import TRACE
from tests.support.tool_trajectories import tool_trajectory


def parsed(name: str) -> apr.Trajectory:
    return apr.dialect(name).parse(DOCUMENTS[name])


def summarize(trajectory: apr.Trajectory):
    return [
        (block.path, block.conclusion, [(b.outline, b.text.strip(), b.result) for b in block.branches])
        for block in trajectory.blocks
    ]


@pytest.mark.parametrize("to", ["multiverse", "npr"])
def test_a_round_trip_restores_the_text(to: str):
    converted = apr.convert(parsed("threadweaver"), to)
    assert converted.dialect == to
    assert apr.dialect(to).is_valid(converted.text)
    assert summarize(converted) == summarize(parsed("threadweaver"))
    assert converted.answer == parsed("threadweaver").answer
    assert apr.convert(converted, "threadweaver").text == TRACE


def test_blocks_in_sequence_and_one_branch():
    converted = apr.convert(parsed("npr"), "multiverse")
    assert summarize(converted) == summarize(parsed("npr"))


@pytest.mark.parametrize("name", apr.dialect_names())
def test_conversion_to_the_same_dialect_keeps_the_text(name: str):
    assert apr.convert(parsed(name), name).text == DOCUMENTS[name]


@pytest.mark.parametrize("name", apr.dialect_names())
def test_text_without_blocks_converts_where_a_reply_needs_none(name: str):
    plain = apr.dialect("threadweaver").parse("Just an answer, x < y.")
    if name == "parathinker":
        with pytest.raises(apr.ConversionError):
            apr.convert(plain, name)
    else:
        assert apr.convert(plain, name).answer == "Just an answer, x < y."


def test_message_dialects_convert_to_one_another():
    converted = apr.convert(parsed("apr"), "spawn")
    assert [b.result for b in converted.blocks[0].branches] == [
        "",
        "Moving to Node #0,1\n27,27 equal: Goal Reached",
    ]
    with pytest.raises(apr.ConversionError, match="spawn to apr"):
        apr.convert(parsed("spawn"), "apr")  # its messages are not nodes


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("multiverse", "threadweaver", "nests at most 1 deep"),
        ("threadweaver", "parallel_r1", "has no outlines, so 'x < y' would be lost"),
        ("parallel_r1", "threadweaver", "requires an outline for each branch"),
        ("parallel_r1", "parathinker", "has no conclusions"),
        ("threadweaver", "spawn", "see different contexts"),
        ("asyncthink", "threadweaver", "see different contexts, or join at different times"),
        ("threadweaver", "pasta", "join at different times"),
    ],
)
def test_what_the_target_cannot_express_is_an_error(name: str, to: str, message: str):
    with pytest.raises(apr.ConversionError, match=message):
        apr.convert(parsed(name), to)


def test_a_missing_conclusion_is_an_error():
    text = TRACE.replace("<Conclusion>both</Conclusion>\n", "")
    with pytest.raises(apr.ConversionError, match="requires a conclusion after every block"):
        apr.convert(apr.dialect("threadweaver").parse(text), "npr")


def test_text_with_tags_of_the_target_is_an_error():
    text = TRACE.replace(" A\n", " a </Path> b\n")
    with pytest.raises(apr.ConversionError):
        apr.convert(apr.dialect("threadweaver").parse(text), "multiverse")


def test_the_prompt_is_kept():
    converted = apr.convert(parsed("threadweaver").with_prompt("Q: "), "npr")
    assert (converted.prompt, converted.spans[1].parents) == ("Q: ", (0,))
    assert apr.Trajectory.from_json(converted.to_json()) == converted


@pytest.mark.parametrize("to", ["threadweaver", "npr", "parallel_r1"])
def test_calls_of_tools_are_an_error(to: str):
    with pytest.raises(apr.ConversionError, match=f"threadweaver to {to}: the trajectory has calls of tools"):
        apr.convert(tool_trajectory("threadweaver"), to)
