"""What a phase that ends with calls of tools, or continues after their results, is parsed to."""

from __future__ import annotations

import pytest

import sgl_apr as apr
from sgl_apr.formats.options import BranchNumbering
from sgl_apr.runtime.phase_output import PhaseOutput, parse_phase_output
from tests.support.tool_sampler import syntax

NOW = '<tool_call>\n{"name":"now", "arguments":{}}\n</tool_call>'
CONCLUSION = "<Conclusion>c</Conclusion>\n</Parallel>"
NUMBER = BranchNumbering("", "1")


def parsed(
    name: str,
    phase: str,
    text: str,
    cut: str | None = None,
    *,
    resumed: bool = False,
    number: BranchNumbering = NUMBER,
    with_tools: bool = True,
) -> PhaseOutput:
    tokenizer = apr.ByteTokenizer()
    ids = (*tokenizer.encode(text), *(() if cut else tokenizer.eos_ids))
    output = parse_phase_output(
        apr.dialect(name), phase, number, (), tuple(ids), cut, tokenizer,
        tool_syntax=syntax("qwen25") if with_tools else None, resumed=resumed,
    )  # fmt: skip
    assert "".join(p.text for p in output.pieces if p.origin == "decoded") == text
    assert tokenizer.decode(output.token_ids) == "".join(p.text for p in output.pieces)
    return output


def roles(output: PhaseOutput) -> list[tuple[str, str]]:
    return [(piece.role, piece.text) for piece in output.pieces]


@pytest.mark.parametrize(
    ("name", "phase", "before", "role", "resumed"),
    [
        ("threadweaver", "trunk", [], "text", False),
        ("threadweaver", "after", [("close", CONCLUSION)], "text", False),
        ("threadweaver", "after", [], "text", True),
        ("threadweaver", "branch", [], "body", False),
        ("threadweaver", "branch", [], "body", True),
        ("multiverse", "branch", [], "body", False),
        ("multiverse", "rejoin", [("close", "c</Conclusion>\n</Parallel>")], "body", False),
        ("multiverse", "rejoin", [], "body", True),
        ("spawn", "branch", [], "body", False),
        ("spawn", "after", [], "text", False),
        ("parathinker", "after", [], "text", True),
        ("asyncthink", "trunk", [], "text", True),
    ],
)
def test_text_before_a_call_keeps_its_role(
    name: str, phase: str, before: list[tuple[str, str]], role: str, resumed: bool
):
    start = "".join(text for _, text in before)
    for text in ("", "Let me see. "):
        for calls in (NOW, NOW + "\n" + NOW):
            output = parsed(name, phase, start + text + calls, resumed=resumed)
            assert roles(output) == [*before, *([(role, text)] if text else []), ("call", calls)]
            assert [c.name for c in output.calls] == ["now"] * calls.count('"now"')
            assert output.finish == "stop"
            assert not output.is_final
            assert not output.cut_call


@pytest.mark.parametrize("cut", ["length", "timeout", "aborted"])
def test_a_cut_inside_a_call(cut: str):
    for end in range(len("<tool_call>"), len(NOW)):
        output = parsed("threadweaver", "branch", " a" + NOW[:end], cut)
        assert roles(output) == [("body", " a"), ("call", NOW[:end])]
        assert output.cut_call
        assert output.calls == ()
        assert output.finish == cut
    output = parsed("threadweaver", "branch", " a" + NOW, cut)
    assert len(output.calls) == 1
    assert output.finish == "stop"


def test_a_cut_before_a_call_begins():
    output = parsed("threadweaver", "branch", " a<tool_ca", "length")
    assert roles(output) == [("body", " a<tool_ca"), ("closer", "</Thread>")]
    assert not output.cut_call


def test_what_is_no_call_stays_text():
    """A model without a mask can write anything."""
    for text in (NOW[:-3], NOW + " and so on", "<tool_call>search</tool_call>"):
        output = parsed("threadweaver", "trunk", "a " + text)
        assert roles(output) == [("text", "a " + text)]
        assert output.is_final
    failed = parsed("threadweaver", "branch", " a" + NOW, "failed")
    assert roles(failed)[0] == ("body", " a" + NOW)
    assert failed.calls == ()


def test_no_call_where_no_free_text_stands():
    for name, phase, text in (
        ("threadweaver", "after", "<Conclusion>" + NOW),
        ("spawn", "branch", "<Return>" + NOW),
        ("threadweaver", "trunk", "<Parallel>\n<Outlines>\n<Outline>1: " + NOW),
        ("threadweaver", "branch", NOW + "</Thread>"),
    ):
        assert parsed(name, phase, text).calls == ()


def test_without_tools_a_call_is_text():
    output = parsed("threadweaver", "trunk", "a " + NOW, with_tools=False)
    assert roles(output) == [("text", "a " + NOW)]


def test_a_resumed_phase_ends_as_others():
    assert roles(parsed("threadweaver", "branch", " done</Thread>", resumed=True)) == [
        ("body", " done"),
        ("closer", "</Thread>"),
    ]
    fork = "<Parallel>\n<Outlines>\n<Outline>1: x</Outline>\n<Outline>2: y</Outline>\n</Outlines>"
    output = parsed("threadweaver", "after", "more " + fork, resumed=True)
    assert [role for role, _ in roles(output)] == ["text", "fork"]
    assert [o.text for o in output.outlines] == ["x", "y"]
    cut = parsed("threadweaver", "branch", " done", "length", resumed=True)
    assert roles(cut) == [("body", " done"), ("closer", "</Thread>")]
    nothing = parsed("threadweaver", "branch", "", "length", resumed=True)
    assert "".join(text for _, text in roles(nothing)).endswith("</Thread>")


def test_a_finished_reply_with_calls_is_valid():
    """Calls and results without tags are text of the dialect, in each of the formats."""
    observation = '\n<tool_response>\n{"time": "12:00"}\n</tool_response>\n'
    used = f"a {NOW}{observation} b"
    threadweaver = (
        f"{used}<Parallel>\n<Outlines>\n<Outline>1: x</Outline>\n<Outline>2: y</Outline>\n</Outlines>\n"
        f"<Thread>\n1:{used}</Thread><Thread>\n2:{used}</Thread>\n{CONCLUSION}{used}"
    )
    multiverse = (
        f"{used}<Parallel>\n<Goal>\n<Outline>\n1:x</Outline>\n<Outline>\n2:y</Outline>\n</Goal>"
        f"\n<Path>\n1:{used}</Path>\n<Path>\n2:{used}</Path>\n<Conclusion>\nc</Conclusion>\n</Parallel>{used}"
    )
    spawn = (
        f"{used}<Spawn>\n<Message>1:x</Message>\n</Spawn><Join>\n<Result>1:{used}</Result>\n</Join>\n{used}"
    )
    for name, text in (("threadweaver", threadweaver), ("multiverse", multiverse), ("spawn", spawn)):
        apr.dialect(name).validate(text)
