"""What is planned by what a run has used."""

from __future__ import annotations

import pytest

import sgl_apr as apr
from sgl_apr.formats.dialects import BranchNumbering
from sgl_apr.runtime.budget import Overhead
from sgl_apr.runtime.cancel_scope import CancelScope
from sgl_apr.runtime.fork_rules import ForkRules
from sgl_apr.runtime.options import make_options
from sgl_apr.runtime.phase_output import FAILURE_NOTE, closing_overhead, parse_phase_output
from sgl_apr.runtime.recorder import TrajectoryRecorder
from sgl_apr.runtime.request_log import RequestLog
from sgl_apr.runtime.span_graph import EventEmitter
from sgl_apr.runtime.usage import FIRST_BRANCH_TOKENS, TEXT_MARGIN, Usage
from tests.runtime.test_loop import reason, scripted


def test_a_branch_is_expected_to_take_what_others_took():
    assert Usage().expected_branch_tokens == FIRST_BRANCH_TOKENS
    assert Usage().with_branch(10).with_branch(20).expected_branch_tokens == 15


def test_the_longest_text_says_what_is_kept_for_the_next():
    assert Usage().expected_text_tokens is None
    assert Usage().with_text(30).with_text(10).expected_text_tokens == TEXT_MARGIN * 30


def test_a_sequence_gets_what_its_branches_have_added():
    start = Usage((5,), (7,))
    first, second = start.with_branch(1), start.with_text(2).with_branch(3)
    assert start.plus(first, start).plus(second, start) == Usage((5, 1, 3), (7, 2))


def widest_second_fork(branch_tokens: int) -> int:
    """Branches that the mask of the text after a join allows, where each branch before wrote so many tokens."""
    branch = "x" * branch_tokens + "</Thread>"
    engine = scripted(branch_1=branch, branch_2=branch, after="</Parallel>\nDone.")
    reason(engine, budget=apr.Budget(tokens=1500, width=6))
    grammar = engine.requests[-1].grammar or ""
    return max((k for k in range(1, 9) if f"outline_{k}" in grammar), default=0)


def test_a_fork_is_no_wider_than_what_branches_have_really_used_allows():
    short, long = widest_second_fork(20), widest_second_fork(200)
    assert short > long >= 2


def test_what_closes_a_fork_depends_on_how_deep_forks_nest():
    dialect, tokenizer = apr.dialect("spawn"), apr.ByteTokenizer()
    flat, nested = (closing_overhead(dialect, tokenizer, depth).of(3) for depth in (1, None))
    assert flat < nested


@pytest.mark.parametrize("room", [len(FAILURE_NOTE) - 1, len(FAILURE_NOTE)])
def test_the_note_of_a_failure_is_written_where_it_fits(room: int):
    output = parse_phase_output(
        apr.dialect("threadweaver"), "branch", BranchNumbering(number="1"), (), (), "failed",
        apr.ByteTokenizer(), max_filler_tokens=room,
    )  # fmt: skip
    assert ("(failed)" in "".join(piece.text for piece in output.pieces)) == (room == len(FAILURE_NOTE))


@pytest.mark.parametrize(("text", "kept"), [(None, 250), (10, 10 * TEXT_MARGIN), (400, 250)])
def test_a_sequence_keeps_no_more_than_its_texts_after_joins_need(text: int | None, kept: int):
    rules = ForkRules(
        make_options("threadweaver", apr.ByteTokenizer(), 300, budget=apr.Budget(reserve=0.25)),
        Overhead(0, 0, 0), RequestLog(EventEmitter(None)), None, shares_tokens=True,
    )  # fmt: skip
    recorder = TrajectoryRecorder(apr.ByteTokenizer(), None)
    trunk = recorder.start_trunk((1,), rules.trunk_allowance(1), CancelScope(None, None, ""))
    if text is not None:
        trunk.usage = trunk.usage.with_text(text)
    assert rules.unreserved(trunk, 1000) == 1000 - kept


@pytest.mark.parametrize(
    ("sampling", "shared"),
    [({}, True), ({"frequency_penalty": 0.0, "repetition_penalty": 1.0}, True), ({"presence_penalty": 0.5}, False)],
)  # fmt: skip
def test_only_penalties_that_count_keep_branches_from_sharing(sampling: dict[str, float], shared: bool):
    branch = "a</Thread>"
    t = reason(scripted(branch_1=branch, branch_2=branch, after="</Parallel>\nDone."), **sampling)
    assert t.tokens_shared == shared
