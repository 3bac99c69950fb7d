"""A trajectory in the terminal: model text as it is, and figures in a row, however many branches there are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

import sgl_apr as apr
from sgl_apr.trajectory.calls import Call
from sgl_apr.views.tree import render_report, render_summary, render_tree

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
