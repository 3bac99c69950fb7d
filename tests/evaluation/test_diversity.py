"""Redundancy and diversity of branches: by hand, at both ends of the scale, and for any document."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgl_apr as apr
from sgl_apr.evaluation.diversity import NGRAM_SIZE, diversity, jaccard_similarity, redundancy, token_ngrams
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.trajectory.spans import Span
from tests.support.document_strategies import documents
from tests.support.threadweaver_traces import TRACE
from tests.support.tool_trajectories import tool_trajectory

ids = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def forked(*branches: str, results: bool = False) -> apr.Trajectory:
    """A fork after one token, one token per byte; with `results` branches return their text in capitals."""
    spans = [Span("text", "decoded", "?", (0,), ())]
    for k, text in enumerate(branches, 1):
        spans.append(Span("header", "injected", "1:", (1, 1), (0,), (1, k)))
        spans.append(
            Span("body", "decoded", text, tuple(text.encode()), (len(spans) - 1,), (1, k), finish="stop")
        )
        if results:
            spans.append(Span("result", "injected", "", (), (len(spans) - 1,), (1, k), label=text.upper()))
    return apr.Trajectory(tuple(spans), "threadweaver")


@pytest.mark.parametrize(
    ("branches", "alike"),
    [
        (("abcdef", "abcdef"), 1.0),
        (("abcdef", "ghijkl"), 0.0),
        (("abcde", "bcdef"), 1 / 3),  # bcde of abcd, bcde, cdef
        (("abcdef", "abcdef", "ghijkl"), 1 / 3),  # of the three pairs one
        (("ab", "ab"), 1.0),
        (("ab", "abc"), 0.0),
        (("abcdef", ""), None),
        (("abcdef",), None),
        ((), None),
    ],
)
def test_redundancy_matches_hand_computed_values(branches: tuple[str, ...], alike: float | None):
    assert redundancy(forked(*branches)) == (alike if alike is None else pytest.approx(alike))


def test_headers_do_not_count():
    assert redundancy(forked("abcd", "efgh")) == 0.0


def test_forks_have_equal_weight():
    one, other = forked("abcdef", "abcdef"), forked("abcdef", "ghijkl", "mnopqr")
    moved = [
        Span(s.role, s.origin, s.text, s.token_ids, tuple(p + len(one.spans) for p in s.parents), (2, *s.path[1:]) if s.path else ())
        for s in other.spans
    ]  # fmt: skip
    assert redundancy(apr.Trajectory((*one.spans, *moved), "threadweaver")) == 0.5


@given(ids, ids)
def test_similarity_is_symmetric_and_one_for_equal_texts(one: list[int], other: list[int]):
    first, second = token_ngrams(one), token_ngrams(other)
    assert jaccard_similarity(first, second) == jaccard_similarity(second, first)
    assert 0 <= jaccard_similarity(first, second) <= 1
    assert (jaccard_similarity(first, second) == 1) == (first == second)
    assert jaccard_similarity(first, first) == 1
    assert all(len(gram) == min(NGRAM_SIZE, len(one)) for gram in first)


def read(text: str) -> str | None:
    return text.rpartition("=")[2].strip() or None if "=" in text else None


@pytest.mark.parametrize(
    ("branches", "different"),
    [
        (("a = 1", "b = 1"), 0.5),
        (("a = 1", "b = 2"), 1.0),
        (("a = 1", "b = 1", "c = 2"), 2 / 3),
        (("a = 1", "none", "c = 2"), 1.0),
        (("a = 1", "none"), None),
        ((), None),
    ],
)
def test_diversity_matches_hand_computed_values(branches: tuple[str, ...], different: float | None):
    assert diversity(forked(*branches), read) == different


def test_a_returned_message_is_the_answer_of_its_branch():
    made = forked("a = x", "b = y", results=True)
    assert diversity(made, read) == 1.0
    assert diversity(made, lambda text: text[-1].isupper()) == 0.5


@pytest.mark.parametrize("name", dialect_names())
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_both_are_shares_for_any_document(name: str, data: st.DataObject):
    dialect = apr.dialect(name)
    made = dialect.parse(data.draw(documents(dialect)), tokenizer=apr.ByteTokenizer(dialect.tags))
    alike, different = redundancy(made), diversity(made, lambda text: text.strip() or None)
    assert alike is None or 0 <= alike <= 1
    assert different is None or 0 < different <= 1


def test_tags_of_a_dialect_do_not_count():
    """All branches start and end with the same tags."""
    made = apr.dialect("threadweaver").parse(TRACE, tokenizer=apr.ByteTokenizer())
    assert redundancy(made) == 0.0
    assert diversity(made, str.strip) == 1.0


def test_calls_of_tools_are_neither_text_nor_answers():
    """Their form is alike in all branches, and a result is what a tool answered."""
    plain = tool_trajectory("threadweaver", cut=False)
    first, second = plain.blocks[0].branches
    assert redundancy(plain) == 0.0
    texts: list[str] = []
    diversity(plain, lambda text: texts.append(text))
    assert [text.strip() for text in texts] == ["A", "B"]
    assert all("tool_call" in branch.text for branch in (first, second))
    cut: list[str] = []
    diversity(tool_trajectory("threadweaver"), lambda text: cut.append(text))
    assert cut == [texts[0], ""], "after a call that was cut stands nothing"
