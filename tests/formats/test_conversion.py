"""The same reply in another format: what can be said stays, what cannot is an error."""

from __future__ import annotations

import pytest

import sgl_apr as apr
from tests.support.example_documents import DOCUMENTS
from tests.support.threadweaver_traces import TRACE


def parsed(name: str) -> apr.Trajectory:
    return apr.dialect(name).parse(DOCUMENTS[name])


def shape(trajectory: apr.Trajectory):
    return [
        (block.path, block.conclusion, [(b.outline, b.text.strip(), b.result) for b in block.branches])
        for block in trajectory.blocks
    ]


@pytest.mark.parametrize("to", ["multiverse", "npr"])
def test_there_and_back_is_the_same_text(to: str):
    there = apr.convert(parsed("threadweaver"), to)
    assert there.dialect == to
    assert apr.dialect(to).is_valid(there.text)
    assert shape(there) == shape(parsed("threadweaver"))
    assert there.answer == parsed("threadweaver").answer
    assert apr.convert(there, "threadweaver").text == TRACE


def test_blocks_in_sequence_and_one_branch():
    there = apr.convert(parsed("npr"), "multiverse")
    assert shape(there) == shape(parsed("npr"))


@pytest.mark.parametrize("name", apr.dialect_names())
def test_to_itself_is_the_same(name: str):
    assert apr.convert(parsed(name), name).text == DOCUMENTS[name]


@pytest.mark.parametrize("name", apr.dialect_names())
def test_text_without_blocks_fits_where_a_reply_may_have_none(name: str):
    plain = apr.dialect("threadweaver").parse("Just an answer, x < y.")
    if name == "parathinker":
        with pytest.raises(apr.ConversionError):
            apr.convert(plain, name)
    else:
        assert apr.convert(plain, name).answer == "Just an answer, x < y."


def test_messages_convert_among_themselves():
    there = apr.convert(parsed("apr"), "spawn")
    assert [b.result for b in there.blocks[0].branches] == [
        "",
        "Moving to Node #0,1\n27,27 equal: Goal Reached",
    ]
    with pytest.raises(apr.ConversionError, match="spawn to apr"):
        apr.convert(parsed("spawn"), "apr")  # its messages are no nodes


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
def test_what_cannot_be_said_is_refused(name: str, to: str, message: str):
    with pytest.raises(apr.ConversionError, match=message):
        apr.convert(parsed(name), to)


def test_a_missing_conclusion_is_not_made_up():
    text = TRACE.replace("<Conclusion>both</Conclusion>\n", "")
    with pytest.raises(apr.ConversionError, match="requires a conclusion after every block"):
        apr.convert(apr.dialect("threadweaver").parse(text), "npr")


def test_text_that_holds_tags_of_the_target_is_refused():
    text = TRACE.replace(" A\n", " a </Path> b\n")
    with pytest.raises(apr.ConversionError):
        apr.convert(apr.dialect("threadweaver").parse(text), "multiverse")


def test_the_prompt_stays():
    there = apr.convert(parsed("threadweaver").with_prompt("Q: "), "npr")
    assert (there.prompt, there.spans[1].parents) == ("Q: ", (0,))
    assert apr.Trajectory.from_json(there.to_json()) == there
