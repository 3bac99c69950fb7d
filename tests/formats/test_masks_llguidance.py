"""Masks in llguidance: what can be decoded, token by token, with tags as tokens and spelled out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

import sgl_apr as apr
from sgl_apr.formats.grammar import grammar_path
from tests.support.masked_sampler import Masked
from tests.support.threadweaver_traces import TAGS, free_text

FORK = "<Parallel>\n<Outlines>\n<Outline>1: x</Outline>\n<Outline>2: y</Outline>\n</Outlines>"


TOKENS, SPELLED = Masked(TAGS), Masked(())
both = pytest.mark.parametrize("masked", [TOKENS, SPELLED], ids=["tokens", "text"])


@both
@pytest.mark.parametrize(
    ("phase", "text", "accepted"),
    [
        ("trunk", "just an answer", True),
        ("trunk", "x < y and <b>bold</b>", True),
        ("trunk", "", False),
        ("trunk", FORK, True),
        ("trunk", "Let me see.\n" + FORK, True),
        ("trunk", "a</Thread>b", False),
        ("trunk", "<Parallel>\n<Outlines>\n</Outlines>", False),
        ("trunk", FORK.replace("2: y", "1: y"), False),
        ("trunk", FORK.replace("2: y", "3: y"), False),
        ("trunk", FORK.replace("<Outline>2: y</Outline>\n", ""), False),
        ("trunk", FORK + "more", False),
        ("body", " x < y\n</Thread>", True),
        ("body", "</Thread>", False),
        ("body", " open", False),
        ("body", " a <Outlines> b</Thread>", False),
        ("body", " a <Thread> b</Thread>", False),
        ("body", " a</Thread> b", False),
        ("body", "</Thread>a</Thread>", False),
        ("body", " a</thread> b</Thread>", False),
        ("body", " a <Outline 1> b</Thread>", False),
        ("trunk", "<Parallel>a" + FORK, False),
        ("after", "<Conclusion>c</Conclusion>\n</Parallel>\nDone", True),
        ("after", "</Parallel>\nDone", True),
        ("after", "</Parallel>\n" + FORK, True),
        ("after", "</Parallel>", False),
        ("after", "Done", False),
    ],
)
def test_phase(masked: Masked, phase: str, text: str, accepted: bool):
    assert masked.accepts(phase, text) is accepted


@both
def test_width_bounds_the_fork(masked: Masked):
    def fork(n: int) -> str:
        outlines = "".join(f"<Outline>{k}: x</Outline>\n" for k in range(1, n + 1))
        return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>"

    assert [n for n in range(1, 8) if masked.accepts("trunk", fork(n), width=5, min_width=3)] == [3, 4, 5]


@both
def test_outlines_can_be_bounded(masked: Masked):
    def outline(n: int) -> str:
        return FORK.replace(": x", ":" + "x" * n)

    assert [n for n in range(1, 9) if masked.accepts("trunk", outline(n), outline_chars=5)] == [1, 2, 3, 4, 5]
    assert masked.accepts("trunk", "a long text before the fork " + outline(3), outline_chars=5)


@both
def test_plain_text_has_no_angle_bracket(masked: Masked):
    assert masked.accepts("body", " a > b & c\n</Thread>", forbid_angle_brackets=True)
    assert not masked.accepts("body", " a < b\n</Thread>", forbid_angle_brackets=True)
    assert masked.accepts(
        "after", "<Conclusion>c</Conclusion>\n</Parallel>\nDone", forbid_angle_brackets=True
    )
    assert masked.accepts("trunk", "Text " + FORK, forbid_angle_brackets=True)
    assert masked.accepts("trunk", FORK, forbid_angle_brackets=True)


@both
def test_fork_required_and_forbidden(masked: Masked):
    assert not masked.accepts("trunk", "an answer", fork="required")
    assert masked.accepts("trunk", "first " + FORK, fork="required")
    assert masked.accepts("trunk", "an answer", fork="forbidden")
    assert not masked.accepts("trunk", FORK, fork="forbidden")


@both
@settings(max_examples=60, deadline=None)
@given(text=free_text())
def test_any_text_without_tags_can_be_decoded(masked: Masked, text: str):
    assert masked.accepts("body", text + "</Thread>")
    assert masked.accepts("trunk", text)


def test_a_tag_that_is_a_token_cannot_be_spelled_out():
    plain = TOKENS.matcher("body")
    ids = SPELLED.backend.encode("a</Thread>").ids  # the same byte ids, but no tag token
    assert plain.try_consume_tokens(ids) < len(ids) - 1


@both
def test_everything_follows_the_grammar_file(masked: Masked, tmp_path):
    """A changed copy of the grammar changes the parser, the mask and the injected text."""
    copy = tmp_path / "worker.lark"
    source = grammar_path("threadweaver").read_text()
    copy.write_text(
        source.replace("</Thread>", "</Worker>")
        .replace("<Thread>", "<Worker>")
        .replace('NUMBER ":" TEXT', 'NUMBER ")" TEXT')
    )
    mine = apr.Dialect.from_file(copy)
    assert mine.grammar.render_rule("header", "1") == "<Worker>\n1:"
    assert masked.accepts("trunk", FORK.replace(": ", ") "), dialect=mine)
    assert not masked.accepts("trunk", FORK, dialect=mine)
    # There </Thread> is ordinary text, unless it is a token.
    assert masked.accepts("body", "a</Thread>b</Worker>", dialect=mine) is (masked is SPELLED)
    trace = FORK.replace(": ", ") ") + "\n<Worker>\n1:a</Worker><Worker>\n2:b</Worker>\n</Parallel>"
    assert [b.text for b in mine.parse(trace).blocks[0].branches] == ["a", "b"]
    assert not apr.dialect("threadweaver").is_valid(trace)


@pytest.mark.parametrize(("low", "high"), [(3, 2), (0, 4), (2, 51)])
def test_impossible_width_is_an_error(low: int, high: int):
    with pytest.raises(apr.GrammarError, match="expected within 1 to 50"):
        apr.dialect("threadweaver").llguidance("trunk", TOKENS, min_width=low, width=high)


@both
@pytest.mark.parametrize("phase", ["trunk", "after"])
def test_text_before_a_fork_that_has_to_come_is_bounded(masked, phase):
    options = {"fork": "required", "lead_chars": 8}
    before = "" if phase == "trunk" else "</Parallel>"
    assert masked.accepts(phase, before + "12345678" + FORK, **options)
    assert masked.accepts(phase, before + FORK, **options)
    assert not masked.accepts(phase, before + "123456789" + FORK, **options)
    assert not masked.accepts(phase, before + "a < b" + FORK, **options)
    assert not masked.accepts(phase, before + "1234", **options)
    if phase == "after":
        concluded = "<Conclusion>12345678</Conclusion>\n</Parallel>"
        assert masked.accepts(phase, concluded + "12345678" + FORK, **options)
        assert not masked.accepts(phase, concluded.replace("8", "89") + FORK, **options)
    # The outlines of the fork are not bounded.
    assert masked.accepts(phase, before + FORK.replace("1: x", "1: a longer outline, x < y"), **options)
