"""A trajectory in the terminal: model text as it is, and figures in a row, however many branches there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

import sgl_apr as apr
from sgl_apr.trajectory.calls import Call
from sgl_apr.views.tree import render_report, render_summary, render_tree

TEXT = "<Parallel>\n<Outlines>\n<Outline>1: [red]a</Outline>\n</Outlines>\n<Thread>\n1: [bold]b[/]</Thread>\n</Parallel>[/]c"


def shown(what: RenderableType) -> str:
    console = Console(width=200)
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
    ("shares", "shown_shares"),
    [
        ([(3, 5)] * 2, "3/4, 3/4"),
        ([(3, 5)] * 5 + [(6, 8)], "5 x 3/4, 1 x 6/7"),
        ([(k, 9) for k in range(6)], "1 x 0/8, 1 x 1/8, 1 x 2/8, 1 x 3/8, ..."),
    ],
)
def test_the_cached_shares_of_branches(shares, shown_shares: str):
    assert f" {shown_shares} " in shown(render_summary({"title": parsed(shares)}))


def test_tree_and_figures():
    text = shown(render_report(parsed(), "title"))
    assert text.count("title") == 2
    assert "Metrics" in text
