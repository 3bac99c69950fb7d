"""Parsing of complete replies: round trips, errors with their position, and completion of text that was cut off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgl_apr as apr
from sgl_apr.errors import TraceError
from sgl_apr.formats import segmenter
from sgl_apr.formats.token_split import split_token_ids
from tests.support.threadweaver_traces import TAGS, TRACE, traces

DIALECT = apr.dialect("threadweaver")


@settings(max_examples=80, deadline=None)
@given(text=traces(), spelled=st.booleans())
def test_render_inverts_parse(text: str, spelled: bool):
    tokenizer = apr.ByteTokenizer(() if spelled else TAGS)
    trajectory = DIALECT.parse(text, tokenizer)
    assert DIALECT.render(trajectory) == text
    assert list(trajectory.token_ids) == tokenizer.encode(text)
    assert all(tokenizer.decode(s.token_ids or ()) == s.text for s in trajectory.spans)
    assert apr.Trajectory.from_json(trajectory.to_json()) == trajectory


def test_structure():
    trajectory = DIALECT.parse(TRACE)
    (block,) = trajectory.blocks
    assert [(b.number, b.outline, b.text) for b in block.branches] == [
        (1, "x < y", " A\n"),
        (2, "and <b>", " BB\n"),
    ]
    assert block.conclusion == "both"
    assert trajectory.answer == "The answer is 4."
    ends = [i for i, s in enumerate(trajectory.spans) if s.role == "closer"]
    tail = next(s for s in trajectory.spans if s.role == "tail")
    assert list(tail.parents) == ends, "the join follows every branch"
    headers = [s.parents for s in trajectory.spans if s.role == "header"]
    assert headers[0] == headers[1], "branches start from one place"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "<Outline>1: x < y</Outline>\n<Outline>2: and <b></Outline>\n",
            "",
            "line 4, column 1: found '</Outlines>', expected \"<Outline>\"",
        ),
        ("2: and", "1: and", "line 5, column 10: found '1', expected \"2\""),
        ("2: and", "3: and", "line 5, column 10: found '3', expected \"2\""),
        ("2: BB", "3: BB", "line 9, column 10: found '<Thread>\\n3:'"),
        ("<Thread>\n2: BB\n</Thread>", "", "expected branch 2, which has an outline"),
        ("</Parallel>\n\nThe answer is 4.", "", 'the text ends, expected "</Parallel>"'),
        ("</Parallel>", "</Outlines>", "line 13, column 1: found '</Outlines>', expected \"</Parallel>\""),
        ("</Thread><Thread>", "</Thread>\n<Thread>", "line 10, column 1: found '<Thread>'"),
        ("The answer", "</Thread>", "line 15, column 1: found '</Thread>'"),
        ("\n<Outlines>", "<Outlines>", "line 2, column 11: found '<Outlines>', expected \"\\n\""),
    ],
)
def test_errors_say_where_and_what(old: str, new: str, message: str):
    assert old in TRACE
    with pytest.raises(TraceError) as error:
        DIALECT.validate(TRACE.replace(old, new))
    assert message in str(error.value)


def test_more_branches_than_the_format_has():
    fork = "".join(f"<Outline>{k}: x</Outline>\n" for k in range(1, 52))
    threads = "".join(f"<Thread>\n{k}: x</Thread>" for k in range(1, 52))
    with pytest.raises(TraceError, match="at most 50 outlines"):
        DIALECT.validate(f"<Parallel>\n<Outlines>\n{fork}</Outlines>\n{threads}\n</Parallel>")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_prefix_of_a_phase_can_be_completed(data: st.DataObject):
    """Wherever a token limit cuts, everything open is closed, and the decoded text is kept."""
    text = data.draw(traces())
    for phase, full in _phases(text):
        cut = full[: data.draw(st.integers(0, len(full)))]
        added = DIALECT.complete_phase(phase, cut)
        assert added is not None
        assert DIALECT.parse_phase(phase, cut + added)[-1].end == len(cut + added)


def _phases(text: str):
    """The phases of a trace, and what a request decodes of each."""
    for block in DIALECT.parse(text).blocks:
        for branch in block.branches:
            yield "body", branch.text + "</Thread>"
    yield "trunk", text.split("</Outlines>")[0] + ("</Outlines>" if "</Outlines>" in text else "")


@pytest.mark.parametrize(
    ("phase", "cut", "added"),
    [
        ("trunk", "abc", ""),
        ("trunk", "abc<Parallel>\n<Outlines>\n<Outline>1: foo", "</Outline>\n</Outlines>"),
        (
            "trunk",
            "<Parallel>\n<Outlines>\n<Outline>1: foo</Outline>\n<Outl",
            "ine>2:...</Outline>\n</Outlines>",
        ),
        ("trunk", "<Parallel>", "\n<Outlines>\n<Outline>1:...</Outline>\n</Outlines>"),
        ("body", "", "...</Thread>"),
        ("body", "foo </Thr", "ead>"),
        ("body", "foo <", "</Thread>"),
        ("after", "<Conclusion>abc</Con", "clusion>\n</Parallel>"),
        ("after", "", "</Parallel>"),
        ("after", "<Conclusion>abc", "</Conclusion>\n</Parallel>"),
        ("after", "</Parallel>abc", ""),
        ("body", "a<Parallel>", None),
        ("trunk", "a</Thread>", None),
    ],
)
def test_completion(phase: str, cut: str, added: str | None):
    assert DIALECT.complete_phase(phase, cut) == added


def test_a_token_belongs_to_the_piece_of_its_first_character():
    tokenizer = apr.ByteTokenizer()
    text = "aé\U0001f600b"
    ids = tokenizer.encode(text)
    assert list(split_token_ids(ids, text, [1, 2, 3, 4], tokenizer)) == [
        tuple(b"a"), tuple("é".encode()), tuple("\U0001f600".encode()), tuple(b"b")
    ]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("a<é\U0001f600\ufffd", max_size=4) | st.sampled_from(DIALECT.tags)))
def test_ids_are_split_as_pieces_were_encoded(pieces: list[str]):
    tokenizer = apr.ByteTokenizer(DIALECT.tags)
    text, ends = "".join(pieces), list(accumulate(map(len, pieces)))
    split = list(split_token_ids(tokenizer.encode(text), text, ends, tokenizer))
    assert split == [tuple(tokenizer.encode(piece)) for piece in pieces]


def test_matching_a_phase_makes_no_error(monkeypatch: pytest.MonkeyPatch):
    """The runtime asks about every phase after a join whether it is a `close`, and about every phase that was cut."""
    monkeypatch.setattr(segmenter, "syntax_error", lambda *_: pytest.fail("an error was made"))
    assert [s.role for s in DIALECT.match_phase("after", "</Parallel>so it is 4.") or ()] == ["close", "text"]
    assert DIALECT.match_phase("after", "<Conclusion>so") is None
    assert DIALECT.match_phase("branch", "I add them") is None
    assert (
        DIALECT.match_phase("trunk", "<Parallel>\n<Outlines>\n<Outline>2: a</Outline>\n</Outlines>") is None
    )


class CountingTokenizer(apr.ByteTokenizer):
    """Counts what it decodes."""

    decoded = 0

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        self.decoded += len(ids)
        return super().decode(ids, after)


def test_ids_are_cut_at_tags_without_a_search():
    tokenizer = CountingTokenizer(TAGS)
    pieces = ["word " * 200, "<Parallel>\n<Outlines>", "1: a" * 50, "</Outlines>", "the end"]
    text, ends = "".join(pieces), list(accumulate(map(len, pieces)))
    ids = tokenizer.encode(text)
    assert [*split_token_ids(ids, text, ends, tokenizer)] == [tuple(tokenizer.encode(p)) for p in pieces]
    assert tokenizer.decoded <= len(ids), "every id is decoded once at most"


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"schema": "other/1"}', '{"schema": "sgl_apr.trajectory/1"}', "{"]
)
def test_other_json_is_an_error(text: str):
    with pytest.raises(TraceError, match="expected"):
        apr.Trajectory.from_json(text)


def test_a_parsed_json_object_is_a_trajectory_too():
    trajectory = DIALECT.parse(TRACE)
    assert apr.Trajectory.from_dict(json.loads(trajectory.to_json())) == trajectory
    with pytest.raises(TraceError, match="the JSON: expected an object, found a list of 0"):
        apr.Trajectory.from_dict([])


def test_json_with_a_broken_span_is_an_error():
    good = DIALECT.parse(TRACE).to_json()
    for old, new, message in [
        ('"role": "fork"', '"role": "spoon"', r"spans\[1\]\.role: expected .*, found 'spoon'"),
        ('"origin"', '"orgin"', r"spans\[0\]: expected a field 'origin'"),
        ('"parents": []', '"parents": 3', r"spans\[0\]\.parents: expected .*, found 3"),
    ]:
        assert old in good
        with pytest.raises(TraceError, match=message):
            apr.Trajectory.from_json(good.replace(old, new, 1))


def test_tokens_of_a_text_are_unknown_without_a_tokenizer():
    with pytest.raises(apr.AprError, match="parse it with tokenizer="):
        DIALECT.parse(TRACE).metrics()
