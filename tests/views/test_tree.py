"""A trajectory in the terminal: model text as it is, and figures in a row, however many branches there are."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

import sgl_apr as apr
from sgl_apr.trajectory.calls import Call
from sgl_apr.views.answer_text import final_text
from sgl_apr.views.page_entry import PageEntry, list_row
from sgl_apr.views.tree import render_report, render_summary, render_tree
from tests.support.tool_trajectories import tool_trajectory

TEXT = "<Parallel>\n<Outlines>\n<Outline>1: [red]a</Outline>\n</Outlines>\n<Thread>\n1: [bold]b[/]</Thread>\n</Parallel>[/]c"


def shown(what: RenderableType, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def parsed(shares: list[tuple[int, int]] = ()) -> apr.Trajectory:
    dialect = apr.dialect("threadweaver")
    calls = tuple(
        Call("branch", (1, k), prompt, cached, 1, 5, 0.0, 1.0) for k, (cached, prompt) in enumerate(shares)
    )
    return replace(dialect.parse(TEXT, apr.ByteTokenizer(dialect.tags)), calls=calls)


def test_text_is_no_markup():
    text = shown(render_tree(parsed(), "[red]title"))
    for text_as_written in ("[red]title", "1: [red]a", "[bold]b[/]", "[/]c"):
        assert text_as_written in text


@pytest.mark.parametrize(
    ("shares", "cached"),
    [
        ([(4, 5)] * 2, "100%"),
        ([(3, 5)] * 2, "75%"),
        ([(3, 5)] * 5 + [(7, 8)], "81%"),
        ([(0, 1)] * 7, "-"),
        ([], "-"),
    ],
)
def test_how_much_of_the_shared_prefix_was_cached(shares, cached: str):
    lines = shown(render_summary({"title": parsed(shares)})).splitlines()
    names, cells = ([cell.strip() for cell in re.split("[┃│]", line)] for line in (lines[2], lines[4]))
    assert cells[names.index("prefix cached")] == cached


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_leaves_out_columns_and_cuts_no_number(width: int):
    title = "A question that is far too long for any table " * 3
    lines = shown(render_summary({title: parsed([(3, 5)])}), width).splitlines()
    assert max(map(len, lines)) <= width
    end = next(k for k, line in enumerate(lines) if line.startswith("└"))
    table, note = "\n".join(lines[: end + 1]), " ".join(" ".join(lines[end + 1 :]).split())
    assert "question" in table
    assert "…" in lines[4]
    for name in (
        "critical path",
        "total tokens",
        "seconds",
        "branches",
        "acceleration",
        "prefix cached",
        "forks",
    ):
        assert (name in table) != (name in note), "each is shown in full or named"
    assert ("seconds" in table) == (width >= 60)
    assert ("forks" in table) == (width >= 120)


def test_long_outlines_are_cut_with_an_ellipsis():
    text = TEXT.replace("[red]a", "very " * 20)
    tree = shown(render_tree(apr.read(text, "threadweaver").trajectory, "title"), 80)
    assert "…" in tree


def test_tree_and_figures():
    text = shown(render_report(parsed(), "title"))
    assert text.count("title") == 2
    assert "Metrics" in text


def test_calls_of_tools_are_lines():
    tooled = tool_trajectory("threadweaver")
    text = shown(render_tree(tooled, "title"))
    assert text.count('→ search {"query": "tides & moons"}') == 1, "of the trunk, in one line"
    assert "← returned in 2.0 s: three hits for call_trunk_1" in text
    panels = " ".join(text.replace("│", " ").split())
    assert panels.count("→ search") == 5
    for words in (
        "returned in 1.0 s",
        "failed in 1.0 s",
        "cut off by a token limit",
        "stopped at its token limit",
    ):
        assert words in panels
    assert text.count("tool_call>") == 1, "only of the call that was cut: all that was decoded"
    assert "tool_response" not in text


def test_what_tools_and_models_write_has_no_escape_sequences():
    hostile = "a\x1b]52;c;cHduZWQ=\x07\n[bold]b[/] " + "c" * 500
    tooled = tool_trajectory("threadweaver")
    calls = tuple(replace(c, name=hostile, arguments=hostile, result=hostile) for c in tooled.tool_calls)
    text = shown(render_report(replace(tooled, tool_calls=calls), "title"))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]b[/] ccc" in text, "it is no markup"
    assert "c" * 300 not in text, "it is cut"


def test_figures_of_tools_are_shown_if_there_are_any():
    text = shown(render_summary({"title": tool_trajectory("threadweaver")}), 240)
    names, cells = ([c.strip() for c in re.split("[┃│]", text.splitlines()[k])] for k in (2, 4))
    found = dict(zip(names, cells, strict=True))
    assert (found["tool calls"], found["tool seconds"], found["tools in sequence"]) == ("5", "5.0", "3.1")
    assert "tool" not in shown(render_summary({"title": parsed()}), 240)


def test_a_fork_without_a_merge_has_no_answer_of_its_own():
    """Its branches are the answers. They stand above."""

    def script(request: apr.Request, prompt: str) -> str:
        return "It leaks." if prompt.endswith("Risks?") else "It is old."

    def fork(merge: str | None) -> apr.Trajectory:
        engine = apr.ScriptedEngine(script)
        return asyncio.run(apr.fork(engine, "A report. ", ["Risks?", "Age?"], merge)).trajectory

    alone, merged = fork(None), fork("Both.")
    text = shown(render_tree(alone, "fork"))
    assert "It leaks." in text
    assert "answer" not in text
    assert "answer  It is old." in shown(render_tree(merged, "fork"))
    assert final_text(alone) == "It leaks.\n\nIt is old."
    assert list_row(PageEntry("fork", alone))["answer"] == "It leaks.\n\nIt is old."
    assert final_text(merged) == merged.answer
    assert "answer  (none)" in shown(render_tree(apr.dialect("threadweaver").parse(""), "empty"))
