"""The live view, by what a person sees of it: hand-made events in, a screen of text out."""

from __future__ import annotations

import io
import sys
import threading
from functools import partial
from typing import get_args

import pytest
from rich.console import Console
from rich.live import Live

from sgl_apr.runtime.events import (
    BranchEnded,
    Delta,
    Done,
    Event,
    Forked,
    Joined,
    SpanFinished,
    TextRetracted,
    ToolCalled,
    ToolReturned,
)
from sgl_apr.trajectory.blocks import Outcome
from sgl_apr.trajectory.calls import LimitHit
from sgl_apr.trajectory.spans import Finish, Path, Role, Span
from sgl_apr.trajectory.tool_calls import ToolCall, ToolOutcome
from sgl_apr.views.live import LiveView

WORDS = {
    "ok": "done",
    "eos": "ended early",
    "length": "token limit",
    "aborted": "aborted",
    "timeout": "out of time",
    "failed": "failed",
    "malformed": "malformed",
}
FORK = Forked((1,), (("1", "count"), ("2", "guess")))
BOTH = (Delta((1, 1), "one two three"), Delta((1, 2), "perhaps five"))
JOIN = (BranchEnded((1, 1), "ok"), BranchEnded((1, 2), "failed"), Joined((1,), (1, 2)))


def view_of(*events: Event) -> LiveView:
    view = LiveView("How many?")
    for event in events:
        view(event)
    return view


def screen(view: LiveView, width: int = 100, height: int = 30) -> list[str]:
    console = Console(record=True, width=width, height=height, file=io.StringIO())
    console.print(view)
    lines = console.export_text().splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    return lines


def see(*events: Event) -> list[str]:
    """The screen after these events. It was also rendered after each of them."""
    view = view_of()
    for event in events:
        view(event)
        lines = screen(view)
    return lines


def line_of(lines: list[str], words: str) -> int:
    """Where these words are, which have to be there once."""
    (index,) = (i for i, line in enumerate(lines) if words in line)
    return index


def shows(lines: list[str], words: str) -> bool:
    return any(words in line for line in lines)


def wrote(role: Role, text: str, path: Path = (), finish: Finish | None = None) -> tuple[Event, Event]:
    """Text and then its span."""
    return Delta(path, text), SpanFinished(0, Span(role, "decoded", text, None, (), path, finish=finish))


def crowd(size: int, words: int = 1) -> list[Event]:
    """So many branches, each with words of its own."""
    events: list[Event] = [Forked((1,), tuple((str(k), "outline") for k in range(1, size + 1)))]
    for k in range(1, size + 1):
        events += [Delta((1, k), f" w{i}of{k}") for i in range(1, words + 1)]
    return events


def finished(*limits: LimitHit) -> Done:
    return Done((), "threadweaver", 3.21, limits, (), (), None, False)


def test_branches_stand_side_by_side_below_the_trunk():
    lines = see(Delta((), "Let me "), Delta((), "think."), FORK, *BOTH)
    assert lines[0] == "How many?"
    titles = line_of(lines, "1: count")
    assert "2: guess" in lines[titles]
    assert line_of(lines, "one two three") == line_of(lines, "perhaps five")
    assert line_of(lines, "Let me think.") < titles < line_of(lines, "one two three")
    assert lines[-1].count("running") == 2
    assert len(lines) == 5, "panels are no higher than what is in them"


def test_many_panels_wrap_to_rows():
    lines = see(*crowd(8))
    assert line_of(lines, "w1of1") == line_of(lines, "w1of3") < line_of(lines, "w1of4")


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_an_outcome_has_a_label(outcome):
    lines = see(FORK, *BOTH, BranchEnded((1, 1), outcome))
    assert WORDS[outcome] in lines[-1].split("╯")[0]
    assert "running" in lines[-1].split("╯")[1]
    joined = see(FORK, *BOTH, BranchEnded((1, 1), outcome), BranchEnded((1, 2), "ok"), Joined((1,), (1, 2)))
    assert WORDS[outcome] in joined[line_of(joined, "1: count")]


def test_a_joined_block_is_one_line_for_each_branch_and_the_trunk_goes_on_below():
    lines = see(Delta((), "Let me think."), FORK, *BOTH, *JOIN, Delta((), "So it is three."))
    assert lines == [
        "How many?",
        "Let me think.",
        "1: count  done  one two three",
        "2: guess  failed  perhaps five",
        "So it is three.",
    ]


def test_a_folded_branch_is_known_by_its_first_words():
    lines = see(FORK, *BOTH, Delta((1, 1), " more" * 50 + " latest"), *JOIN)
    assert "one two three more" in lines[1]
    assert "latest" not in lines[1]


def test_the_next_block_stands_below_the_first():
    second = (Forked((2,), (("1", "check"), ("2", "recheck"))), Delta((2, 2), "it holds"))
    lines = see(FORK, *BOTH, *JOIN, Delta((), "So it is three."), *second)
    assert line_of(lines, "1: count") < line_of(lines, "So it is three.") < line_of(lines, "1: check")
    assert line_of(lines, "1: check") == line_of(lines, "2: recheck") < line_of(lines, "it holds")


def test_a_branch_that_a_join_left_out_is_folded_too():
    cut = (BranchEnded((1, 2), "aborted"), BranchEnded((1, 1), "ok"), Joined((1,), (1,)))
    lines = see(FORK, *BOTH, *cut, Delta((), "So it is three."))
    assert lines[1:] == [
        "1: count  done  one two three",
        "2: guess  aborted  perhaps five",
        "So it is three.",
    ]


def test_text_that_comes_again_is_shown_once():
    lines = see(
        Delta((), "I think so"),
        TextRetracted((), 3),
        Delta((), " not"),
        FORK,
        *BOTH,
        TextRetracted((1, 2), 4),
    )
    assert shows(lines, "I think not")
    assert shows(lines, "perhaps ")
    assert not shows(lines, "five")
    assert shows(lines, "one two three")


def test_a_retried_branch_has_no_earlier_text():
    inner = (Forked((1, 2, 1), (("2.1", "low"), ("2.2", "high"))), Delta((1, 2, 1, 1), "deep"))
    events = (FORK, *BOTH, *inner, BranchEnded((1, 2), "failed"))
    assert shows(see(*events), "2.1")
    lines = see(*events, TextRetracted((1, 2), None), Delta((1, 2), "seven"))
    assert not any(shows(lines, gone) for gone in ("perhaps", "2.1", "deep", "failed"))
    assert line_of(lines, "seven") == line_of(lines, "one two three")
    assert lines[-1].count("running") == 2


def test_nested_branches_are_in_the_panel_of_their_parent():
    inner = Forked((1, 2, 1), (("2.1", "low"), ("2.2", "high")))
    innermost = Forked((1, 2, 1, 1, 1), (("2.1.1", "deepest"),))
    deltas = (Delta((1, 2, 1, 2), "upwards"), Delta((1, 2, 1, 1, 1, 1), "down there"))
    events = (FORK, *BOTH, inner, innermost, *deltas)
    lines = see(*events)
    order = [
        line_of(lines, words)
        for words in ("2: guess", "perhaps five", "2.1: low", "2.1.1: deepest", "2.2: high")
    ]
    assert order == sorted(set(order))
    left, right = lines[order[-1]].split("││")
    assert "2.2: high  running  upwards" in right
    assert not left.strip("│ ")
    assert "down there" in lines[order[-2]]
    ended = (
        BranchEnded((1, 2, 1, 1, 1, 1), "ok"),
        BranchEnded((1, 2, 1, 1), "length"),
        BranchEnded((1, 2, 1, 2), "ok"),
    )
    lines = see(*events, *ended, Joined((1, 2, 1), (1, 2)), Delta((1, 2), "between them"))
    assert "token limit" in lines[line_of(lines, "2.1: low")]
    assert line_of(lines, "2.2: high  done  upwards") < line_of(lines, "between them")
    assert not shows(lines, "deepest")


def test_nested_branches_have_a_line_each_in_a_narrow_panel():
    inner = Forked((1, 3, 1), (("3.1", "low"), ("3.2", "high")))
    ended = (BranchEnded((1, 3, 1, 1), "length"), BranchEnded((1, 3, 1, 2), "malformed"))
    view = view_of(*crowd(3), inner, *(Delta((1, 3, 1, k), "a few words") for k in (1, 2)), *ended)
    lines = screen(view, width=80)
    first = line_of(lines, "3.1")
    assert "token limit" in lines[first]
    assert "malformed" in lines[first + 1]
    assert "╰" in lines[first + 2]


def test_a_trunk_may_go_on_beside_its_branches():
    events: list[Event] = [Delta((), "first "), Forked((1,), (("1", "count"),)), Delta((), "second ")]
    events += [Forked((1,), (("2", "guess"),), first_branch=2), Delta((), "third"), *BOTH]
    lines = see(*events)
    assert line_of(lines, "third") < line_of(lines, "1: count") == line_of(lines, "2: guess")
    assert line_of(lines, "one two three") == line_of(lines, "perhaps five")
    lines = see(*events, BranchEnded((1, 1), "ok"), Joined((1,), (1,)), Delta((), "fourth"))
    order = [line_of(lines, w) for w in ("third", "1: count  done  one two three", "fourth", "2: guess")]
    assert order == sorted(set(order))
    late = (
        BranchEnded((1, 2), "ok"),
        Joined((1,), (2,)),
        Delta((), "fourth"),
        BranchEnded((1, 1), "ok"),
        Joined((1,), (1,)),
    )
    lines = see(*events, *late, Delta((), "fifth"))
    order = [line_of(lines, w) for w in ("third", "2: guess", "fourth", "1: count", "fifth")]
    assert order == sorted(set(order)), "branches are where they were joined"
    lines = see(*events, *JOIN, Delta((), "fifth"), Forked((2,), (("1", "again"),)))
    assert line_of(lines, "2: guess  failed") < line_of(lines, "fifth") < line_of(lines, "1: again")


def test_what_was_never_forked_is_shown_all_the_same():
    lines = see(
        Delta((1, 2), "out of nowhere"),
        BranchEnded((1, 3), "ok"),
        TextRetracted((2, 1), 5),
        Joined((3,), (1,)),
    )
    assert shows(lines, "out of nowhere")
    assert lines[-1].count("done") == 1
    assert screen(LiveView("Why?")) == ["Why?"]


def test_tags_are_left_out():
    fork = wrote("fork", "<Parallel>1: count</Parallel>")
    header, result = wrote("header", "<Thread>1:", (1, 1)), wrote("result", "<Result>three</Result>", (1, 1))
    before = (Delta((), "Let me think."), *fork, FORK, *header, *BOTH)
    assert not any(shows(see(*before), tag) for tag in ("<Parallel>", "<Thread>"))
    after = see(*before, BranchEnded((1, 1), "ok"), *result, *JOIN[1:], *wrote("tail", "<Tail>"))
    assert not any("<" in line for line in after)
    assert shows(after, "Let me think.")
    assert shows(after, "one two three")
    retried = see(*before, TextRetracted((1, 1), None), Delta((1, 1), "<Thread>1:"), Delta((1, 1), "four"))
    assert line_of(retried, "four") == line_of(retried, "perhaps five")
    assert not shows(retried, "<Thread>")


def test_a_tag_is_not_left_out_where_it_is_all_there_is_to_see():
    assert shows(see(*wrote("fork", "<Parallel>no", finish="malformed")), "<Parallel>no")
    assert shows(see(*wrote("text", "<b>")), "<b>")
    header = wrote("header", "<Thread>1:", (1, 1))
    assert shows(see(FORK, *header, *BOTH, Delta((1, 1), "<Thread>1:")), "one two three<Thread>1:")


def test_model_text_is_no_markup():
    odd = "[bold red]x[/] :smile: [link=http://a]"
    view = LiveView(odd)
    for event in (Delta((), "T" + odd), Forked((1,), (("[i]1", odd),)), Delta((1, 1), "B" + odd)):
        view(event)
    running = screen(view)
    assert running[0] == odd
    assert all(shows(running, shown) for shown in ("T" + odd, "[i]1: " + odd, "B" + odd))
    for event in (BranchEnded((1, 1), "ok"), Joined((1,), (1,))):
        view(event)
    assert shows(screen(view), f"B{odd}")


def test_model_text_cannot_control_the_terminal():
    odd = "a\x1b[2J\x1b]0;owned\x07b\x9b31m\u202ec\x08\x00\x7f\r\u2028\ud800d"
    view = LiveView(odd)
    events: list[Event] = [Delta((), odd), Forked((1,), ((odd, odd),)), Delta((1, 1), odd)]
    events += [Forked((1, 1, 1), ((odd, odd),)), Delta((1, 1, 1, 1), odd)]
    for event in (
        *events,
        BranchEnded((1, 1), "ok"),
        Joined((1,), (1,)),
        Delta((), odd),
        finished(LimitHit(odd, ())),
    ):
        view(event)
        lines = screen(view)
        assert all(c.isprintable() for line in lines for c in line)
    assert shows(lines, "owned")
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system=None, width=100).print(view)
    assert "\x1b[2J" not in file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(100, 30), (80, 24), (200, 60)])
def test_fifty_branches_fit(width, height):
    view = view_of(Delta((), "before " * 500), *crowd(50, words=40), BranchEnded((1, 7), "malformed"))
    shown = "\n".join(screen(view, width, height))
    assert "before" in shown
    assert shown.count("running") == 49
    assert shown.count("malformed") == 1
    followed = [k for k in range(1, 51) if k != 7 and f"of{k} " in shown.replace("│", " ")]
    assert len(followed) == 49, "the last words of each are in view"
    for k in range(1, 51):
        view(BranchEnded((1, k), "ok"))
    for event in (Joined((1,), tuple(range(1, 51))), Delta((), "later"), finished()):
        view(event)
    lines = screen(view, width, height)
    assert line_of(lines, "50: outline") < line_of(lines, "later") < line_of(lines, "branches: 50")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 20, 33, 50])
def test_the_end_of_long_texts_is_in_view(size):
    lines = screen(view_of(Delta((), "before " * 500 + "latest"), *crowd(size, words=300)), height=24)
    assert len(lines) == 24 or size > 12
    assert shows(lines, "latest")
    assert all(shows(lines, f"w300of{k}") for k in range(1, size + 1))
    assert not shows(lines, "w1of")


@pytest.mark.parametrize("size", [1, 7, 50])
def test_no_terminal_is_too_small_to_show_it(size):
    inner = Forked((1, 1, 1), (("1.1", "low"), ("1.2", "high")))
    view = view_of(Delta((), "before " * 50), *crowd(size, words=9), inner, Delta((1, 1, 1, 1), "deep " * 9))
    for width in (*range(1, 12), *range(12, 60, 6)):
        for height in range(1, 40, 6):
            console = Console(width=width, height=height, file=io.StringIO())
            assert console.render_lines(view)


def test_lines_stay_as_they_broke_while_text_grows():
    view, moved, before = view_of(), 0, list[str]()
    for k in range(400):
        view(Delta((), f"{'word' * (k % 5)}{k} "))
        lines = screen(view, 40, 10)[1:]
        moved += not set(before[1:-1]) <= set(lines)
        before = lines
    assert moved <= 10


def test_the_last_line_has_the_summary():
    limits = (LimitHit("branch_tokens", (1, 1)), LimitHit("branch_tokens", (1, 2)), LimitHit("seconds", ()))
    inner = Forked((1, 2, 1), (("2.1", "low"), ("2.2", "high")))
    lines = see(FORK, *BOTH, inner, *JOIN, finished(*limits))
    assert lines[-1] == "branches: 4 · limits reached: branch_tokens, seconds · 3.2 s"
    assert see(Delta((), "42"), finished())[1:] == ["42", "branches: 0 · limits reached: none · 3.2 s"]
    assert see(FORK, *BOTH, finished())[1:3] == [
        "1: count  running  one two three",
        "2: guess  running  perhaps five",
    ]


def test_it_listens_to_any_thread_while_two_show_it(request):
    view, file = view_of(crowd(4)[0]), io.StringIO()
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)

    def write(k: int) -> None:
        for i in range(3000):
            view(Delta((1, k), f"{i} "))
        view(TextRetracted((1, k), 5))
        view(Delta((1, k), f"end{k}"))

    console = Console(file=file, force_terminal=True, width=100, height=30)
    writers = [threading.Thread(target=write, args=(k,)) for k in range(1, 5)]
    with Live(view, console=console, refresh_per_second=50):
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            screen(view)
        for writer in writers:
            writer.join()
    lines = screen(view)
    assert all(shows(lines, f"2998 end{k}") for k in range(1, 5))
    assert "end4" in file.getvalue()


ASK = '<tool_call>{"name": "search", "arguments": {"query": "tides"}}</tool_call>'


def calls(path: Path, *names: str) -> list[Event]:
    """A sequence writes text and calls tools, which start to run."""
    label = " ".join(names)
    events: list[Event] = [Delta(path, "Let me look."), Delta(path, ASK)]
    events.append(SpanFinished(1, Span("call", "decoded", ASK, None, (), path, label)))
    return [*events, *(ToolCalled(path, name, "search", '{"query": "tides"}') for name in names)]


def returned(path: Path, name: str, outcome: ToolOutcome = "ok", result: str = "3 hits") -> ToolReturned:
    return ToolReturned(0, ToolCall(name, path, "search", '{"query": "tides"}', result, outcome, 1.0, 2.5))


def observed(path: Path, label: str) -> tuple[Event, Event]:
    text = "\n<tool_response>\n3 hits\n</tool_response>\n"
    return Delta(path, text), SpanFinished(2, Span("observation", "injected", text, None, (), path, label))


def test_a_branch_whose_tool_runs():
    lines = see(FORK, *BOTH, *calls((1, 1), "a"))
    assert '→ search {"query": "tides"}' in lines[line_of(lines, "→ search")]
    assert "runs search" in lines[-1].split("╯")[0]
    assert "running" in lines[-1].split("╯")[1], "its sibling decodes"
    assert not shows(lines, "tool_call"), "the line stands for the text of the call"
    lines = see(
        FORK,
        *BOTH,
        *calls((1, 1), "a"),
        returned((1, 1), "a"),
        *observed((1, 1), "a"),
        Delta((1, 1), "So 3."),
    )
    order = [line_of(lines, w) for w in ("Let me look.", "→ search", "← returned in 1.5 s: 3 hits", "So 3.")]
    assert order == sorted(set(order))
    assert not shows(lines, "tool_response")
    assert lines[-1].count("running") == 2


def test_tools_that_run_at_once():
    lines = see(FORK, *BOTH, *calls((1, 1), "a", "b", "c"))
    assert "runs search and 2 more" in lines[-1]
    lines = see(FORK, *BOTH, *calls((1, 1), "a", "b"), returned((1, 1), "b", "timeout", "Error: late"))
    assert "runs search" in lines[-1]
    assert "more" not in lines[-1]
    assert shows(lines, "← timed out in 1.5 s: Error: late")
    retried = see(FORK, *BOTH, *calls((1, 1), "a"), TextRetracted((1, 1), None))
    assert not shows(retried, "search")


def test_the_trunk_calls_a_tool():
    lines = see(*calls((), "a"))
    assert lines[-1] == "runs search"
    lines = see(*calls((), "a"), returned((), "a", "cancelled", ""), finished())
    assert lines[-2] == "← cancelled in 1.5 s"
    assert "runs" not in lines[-1]


def test_a_call_that_was_not_run():
    lines = see(
        Delta((), "So"),
        Delta((), ASK[:20]),
        SpanFinished(1, Span("call", "decoded", ASK[:20], None, (), (), "a")),
        returned((), "a", "length", ""),
    )
    assert lines[1:] == ["So", '→ search {"query": "tides"}', "← cut off by a token limit"]


def test_what_tools_write_is_text():
    hostile = "\x1b]0;owned\x07\n[bold]x[/]\u202e" + "y" * 5000
    lines = see(
        FORK,
        ToolCalled((1, 1), "a", hostile, hostile),
        ToolCalled((1, 1), "b", "f", hostile),
        returned((1, 1), "b", "error", hostile),
    )
    text = "\n".join(lines)
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert "[bold]x[/]" in text
    assert len(lines) < 30, "it is cut"
