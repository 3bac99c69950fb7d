"""The page in a browser: it draws what the files contain, works by mouse and keyboard, and no text can change it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.report_files import expand_sweeps, read_entries
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.trajectory.metrics import longest_paths
from sgl_apr.views.page import render_page
from sgl_apr.views.page_entry import PageEntry
from tests.support.browser import PHONE, WIDE, Tab, launched, tab, url
from tests.support.tool_trajectories import tool_trajectory
from tests.views.test_page import HOSTILE, evaluation, forked, many, sampled, saying

LARGE = 2000
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


@pytest.fixture(scope="module")
def made() -> dict[str, apr.Trajectory]:
    """One of every dialect, and a plain one."""
    return {"plain": forked()} | {name: sampled(name, seed=2) for name in dialect_names()}


@pytest.fixture(scope="module")
def report(made: dict[str, apr.Trajectory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(many(tmp_path_factory.mktemp("page") / "many.jsonl", made))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of two methods on twelve problems, a third of them wrong; one method never forks."""
    forks = [(sampled("spawn", seed), seed % 3 > 0) for seed in range(12)]
    plain = [
        (replace(forked(), dialect="sequential", spans=forked().spans[:2]), seed % 2 > 0)
        for seed in range(12)
    ]
    return written(evaluation(tmp_path_factory.mktemp("judged"), {"apr": forks, "sequential": plain}))


def written(source: Path) -> Path:
    out = (source if source.is_dir() else source.parent) / "page.html"
    out.write_text(render_page(read_entries([source]), "A report", "of something"))
    return out


def opened(browser: Any, path: Path, entry: int | None = None, **options: Any) -> Tab:
    """Open the page and wait until the entry is drawn."""
    opened_tab = tab(browser, **options)
    opened_tab.go(url(path, entry))
    if entry is not None:
        opened_tab.page.wait_for_selector("#lanes .lane")
    return opened_tab


def plain(text: str) -> str:
    """Signs for what is hidden, as the page shows it."""

    def sign(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 32 else f"⟨U+{code:04X}⟩"

    return HIDDEN.sub(sign, text)


def lane_of(span: apr.Span) -> tuple[int, ...]:
    return span.path[:-2] if span.role == "result" else span.path


def named(path: tuple[int, ...]) -> str:
    return ".".join(map(str, path)) or "trunk"


def number(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text))


# What is drawn is what the file holds


@pytest.mark.parametrize("axis", ["tokens", "time"])
def test_lanes_and_totals_are_those_of_the_trajectory(browser, report: Path, made, axis: str):
    shown = opened(browser, report, 0)
    for k, t in enumerate(made.values()):
        shown.page.evaluate("k => openEntry(known.entries[k])", k)
        shown.until(f"view.entry.id === {k}")
        shown.page.locator(f"input[value={axis}]").check(force=True)
        m = t.metrics()
        tiles = {n: number(shown.text(f"[data-figure={n}] b")) for n in ("tokens", "critical", "branches")}
        assert tiles == {"tokens": m.total, "critical": m.critical_path, "branches": m.branches}
        assert number(shown.text("[data-figure=parallelism] b")) == pytest.approx(m.parallelism, rel=0.01)
        lanes = shown.page.locator("#lanes .lane").evaluate_all(
            "rows => rows.map(r => [r.dataset.lane, Number(r.querySelector('.tokens').textContent.replace(',', ''))])"
        )
        paths = sorted({(), *(s.path for s in t.spans)})
        assert lanes == [[named(p), sum(s.tokens for s in t.reply if lane_of(s) == p)] for p in paths]
        assert sum(tokens for _, tokens in lanes) == m.total
        drawn = shown.page.locator("#lanes rect.bar").count()
        assert drawn == len(t.spans) - (axis == "time"), "each span once; the prompt takes no time"
    assert shown.complaints == []


def test_spans_begin_where_the_longest_chain_of_what_they_follow_ends(browser, report: Path, made):
    shown = opened(browser, report, 0)
    for k, t in enumerate(made.values()):
        shown.page.evaluate("k => { view.axis = 'tokens'; return openEntry(known.entries[k]) }", k)
        ends = longest_paths(t.spans, [0 if s.origin == "prompt" else s.tokens for s in t.spans])
        assert shown.page.evaluate("view.layout.ends") == ends
        chain = shown.page.evaluate("chainOf(view.t.spans, view.layout.ends)")
        assert (
            sum(t.spans[i].tokens for i in chain if t.spans[i].origin != "prompt")
            == t.metrics().critical_path
        )
        figures = shown.page.evaluate("computeFigures(view.t)")
        m = t.metrics()
        assert figures == {
            "tokens": m.total, "critical": m.critical_path, "inside": m.branch_tokens, "blocks": m.blocks, "branches": m.branches,
            "wall": m.wall_s, "calls": m.engine_calls, "prompt": m.prompt_tokens, "cached": m.cached_tokens,
            "again": m.reprefilled_tokens, "tools": m.tool_calls, "tool_s": m.tool_s, "critical_tool_s": m.critical_tool_s,
        }  # fmt: skip


def test_decoded_spans_stand_where_their_request_was_under_way(browser, report: Path, made):
    shown = opened(browser, report, 0)
    placed = shown.page.evaluate("placedByTime(view.t)")
    t = made["plain"]
    for i, span in enumerate(t.spans):
        begin, end = placed["starts"][i], placed["ends"][i]
        if span.call is None:
            assert (
                begin == end == max((placed["ends"][p] for p in (*span.parents, *span.waits_for)), default=0)
            )
        else:
            call = t.calls[span.call]
            assert call.started - 1e-4 <= begin <= end <= call.ended + 1e-4
    assert t.wall_s >= max(placed["ends"])


READ = """() => Object.fromEntries(view.lanes.map(({ key }) => {
    chooseLane(key);
    return [key, [...document.querySelectorAll("#reader [data-span]")].map(n => [Number(n.dataset.span), n.textContent, n.className])];
}))"""


def test_every_text_can_be_read(browser, report: Path, made):
    shown = opened(browser, report, 0)
    for k, t in enumerate(made.values()):
        shown.page.evaluate("k => openEntry(known.entries[k])", k)
        expected: dict[str, list] = {named(path): [] for path in {(), *(s.path for s in t.spans)}}
        for i, span in enumerate(t.spans):
            expected[named(lane_of(span))] += [[i, plain(span.text), span.origin]] if span.text else []
        assert shown.page.evaluate(READ) == expected


def test_facts_of_a_branch(browser, report: Path, made):
    shown = opened(browser, report, 0)
    shown.page.locator('[data-lane="1.2"]').click()
    assert shown.text("#reader h3").replace("\n", " ") == "Branch 1.2 right"
    facts = dict(line.split("\n") for line in shown.page.locator("#reader .facts > div").all_inner_texts())
    own = [s for s in made["plain"].spans if s.path == (1, 2)]
    (call,) = (c for c in made["plain"].calls if c.path == (1, 2))
    assert int(facts["decoded"]) == sum(s.tokens for s in own if s.origin == "decoded")
    assert int(facts["injected"]) == sum(s.tokens for s in own if s.origin == "injected")
    assert int(facts["cached"]) == call.cached_tokens
    assert int(facts["prefilled"]) == call.prompt_tokens - call.cached_tokens
    assert facts["finish"] == "complete"


def test_a_join_by_message_has_dashed_edges_and_a_fork_whole_ones(browser, report: Path, made):
    shown = opened(browser, report, list(made).index("spawn"))
    spans = made["spawn"].spans
    crossing = [(p, s) for s in spans for p in s.waits_for if lane_of(s) != lane_of(spans[p])]
    assert crossing
    assert shown.page.locator(".edge.message").count() == len(crossing)
    shown.page.evaluate("openEntry(known.entries[0])")
    shown.until("view.entry.id === 0")
    assert shown.page.locator(".edge.seen").count() == 4, "two branches, forked and joined"
    assert shown.page.locator(".edge.message").count() == 0
    assert (shown.page.locator("circle.fork").count(), shown.page.locator("circle.join").count()) == (1, 1)


# Calls of tools


def test_calls_of_tools_are_drawn_and_described(browser, tmp_path: Path):
    hostile = HOSTILE[0] + "\u202e" + "x" * 3000
    tooled = tool_trajectory("threadweaver")
    first, *rest = tooled.tool_calls
    tooled = replace(
        tooled, tool_calls=(replace(first, name="<b>", arguments=hostile, result=hostile), *rest), wall_s=4.0
    )
    page = tmp_path / "page.html"
    page.write_text(render_page([PageEntry("tools", tooled), PageEntry("none", forked())]))
    shown = opened(browser, page, 0)
    roles = [s.role for s in tooled.spans]
    assert shown.page.locator(".call-frame").count() == roles.count("call") == 4
    assert shown.page.locator(".stripes").count() == roles.count("observation") == 4
    assert shown.page.locator("#lanes .cut.failed").count() == 1, "of the result that says that a tool failed"
    legend = shown.page.locator(".legend li").all_inner_texts()
    assert legend[-2:] == ["call of a tool", "its result"]
    m = tooled.metrics()
    assert shown.text("[data-figure=tools]").split("\n") == [
        "5 calls of tools",
        "5.00 s",
        "3.13 s on the longest chain",
    ]
    figures = shown.page.evaluate("toolFigures(view.t)")
    assert figures == {"tools": 5, "tool_s": m.tool_s, "critical_tool_s": m.critical_tool_s}
    shown.page.evaluate("chooseLane('1.2')")
    assert shown.page.locator("#reader .text .tool").all_inner_texts() == [
        "search\nfailed, 1.00 s",
        "search\ncut off by a token limit",
    ]
    assert "tools\n2" in shown.page.locator("#reader .facts > div").all_inner_texts()
    assert shown.page.evaluate("tooltipLines(view.layout, view.lanes[0], view.layout.starts[2])")[2:4] == [
        f"<b> {plain(HOSTILE[0])}⟨U+202E⟩" + "x" * (90 - len(HOSTILE[0]) - 9) + "…",
        f"returned, 2.00 s: {plain(HOSTILE[0])}⟨U+202E⟩" + "x" * (90 - len(HOSTILE[0]) - 9) + "…",
    ]
    shown.page.evaluate("openEntry(known.entries[1])")
    shown.until("view.entry.id === 1")
    assert shown.page.locator(".legend li").count() == len(legend) - 2, "nothing about tools without any"
    assert shown.page.locator("[data-figure=tools]").count() == 0
    shown.page.click("#to-overview")
    assert shown.page.locator("#overview [data-name^=tool]").all_inner_texts() == ["2.5", "2.50 s"], (
        "the mean of both"
    )
    assert shown.complaints == []


def test_a_result_stands_where_its_tool_ran(browser, tmp_path: Path):
    tooled = tool_trajectory("threadweaver")
    page = tmp_path / "page.html"
    page.write_text(render_page([PageEntry("tools", tooled)]))
    shown = opened(browser, page, 0)
    placed = shown.page.evaluate("placedByTime(view.t)")
    by_id = {call.id: call for call in tooled.tool_calls}
    observations = [i for i, s in enumerate(tooled.spans) if s.role == "observation"]
    assert observations
    for i in observations:
        call = by_id[tooled.spans[i].label]
        assert (placed["starts"][i], placed["ends"][i]) == (call.started, call.ended)


# The list


def names(shown: Tab) -> list[str]:
    return shown.page.evaluate("list.shown.map(e => `${e.method} ${e.name}`)")


def test_filters(browser, judged: Path):
    shown = opened(browser, judged)
    assert len(names(shown)) == 24
    shown.page.select_option("#method", "apr")
    assert len(names(shown)) == 12
    shown.page.select_option("#verdict", "wrong")
    assert names(shown) == [f"apr problem {k}" for k in (0, 3, 6, 9)]
    assert shown.text("#found") == "4 of 24"
    shown.page.select_option("#verdict", "")
    shown.page.select_option("#method", "")
    shown.page.select_option("#forked", "no")
    assert all(name.startswith("sequential") for name in names(shown))
    shown.page.select_option("#forked", "yes")
    assert all(name.startswith("apr") for name in names(shown))
    shown.page.select_option("#forked", "")
    shown.page.fill("#find", "PROBLEM 11")
    assert names(shown) == ["apr problem 11", "sequential problem 11"]
    shown.page.fill("#find", "nothing like it")
    assert shown.page.locator("#rows [role=option]").count() == 0
    for key in ("ArrowDown", "Enter", "End"):
        shown.page.locator("#rows").press(key)
    assert shown.complaints == []


def test_sorting(browser, judged: Path):
    shown = opened(browser, judged)
    for key in ("tokens", "critical", "parallelism", "wall", "branches", "size"):
        shown.page.select_option("#sort", key)
        values = shown.page.evaluate("key => list.shown.map(e => e[key])", key)
        assert values == sorted(values)
        assert len(set(values)) > 1
        shown.page.click("#direction")
        assert shown.page.evaluate("key => list.shown.map(e => e[key])", key) == sorted(values, reverse=True)
        assert shown.page.get_attribute("#direction", "aria-pressed") == "true"
        shown.page.click("#direction")


def test_attempts_at_the_same_problem_are_linked(browser, judged: Path):
    shown = opened(browser, judged, 3)
    assert "problem 3" in shown.text("#detail h2")
    shown.page.click("#detail .others button")
    shown.until("view.entry.method === 'sequential'")
    assert "problem 3" in shown.text("#detail h2")


# The keyboard


def test_all_of_it_works_by_keyboard(browser, report: Path):
    shown = opened(browser, report)
    page = shown.page
    focused = "document.activeElement.id"
    page.focus("#rows")
    page.keyboard.press("ArrowDown")
    shown.until("view.entry?.id === 1")
    page.keyboard.press("Home")
    shown.until("view.entry?.id === 0")
    page.keyboard.press("Enter")
    shown.until("document.activeElement.id === 'lanes'")
    chosen = "document.querySelector('#lanes [aria-selected=true]').dataset.lane"
    assert page.evaluate(chosen) == "trunk"
    for key, lane in (("ArrowDown", "1.1"), ("ArrowDown", "1.2"), ("ArrowDown", "1.2"), ("ArrowLeft", "trunk"), ("ArrowRight", "1.1"), ("End", "1.2"), ("Home", "trunk"), ("ArrowDown", "1.1")):  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(chosen) == lane
        assert page.get_attribute("#lanes", "aria-activedescendant") == f"lane-{lane}"
    assert shown.text("#reader h3").startswith("Branch 1.1")
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "reader"
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "lanes"
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "rows"
    page.keyboard.press("Escape")
    assert page.evaluate("document.body.dataset.view") == "overview"
    assert shown.complaints == []


def test_focus_can_be_seen_and_everything_has_a_name(browser, judged: Path):
    shown = opened(browser, judged, 2)
    seen = set()
    for _ in range(60):
        shown.page.keyboard.press("Tab")
        name = shown.page.evaluate(
            "(n => n.id || n.className || n.value || n.tagName)(document.activeElement)"
        )
        if name == "BODY":
            break
        seen.add(name)
        style = shown.page.evaluate(
            "(n => { const s = getComputedStyle(n.matches('.switch input') ? n.nextElementSibling : n); return [s.outlineStyle, s.outlineWidth] })(document.activeElement)"
        )
        assert style == ["solid", "3px"], name
    assert {"find", "method", "sort", "direction", "rows", "lanes", "tokens"} <= seen
    session = shown.page.context.new_cdp_session(shown.page)
    roles = {
        "button",
        "combobox",
        "searchbox",
        "listbox",
        "option",
        "radio",
        "image",
        "img",
        "article",
        "region",
    }
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    controls = [n for n in nodes if not n["ignored"] and n["role"]["value"] in roles]
    assert len(controls) > 20
    assert [n for n in controls if not n["name"]["value"].strip()] == []


# Plots


@pytest.mark.parametrize(
    ("scheme", "viewport"), [("light", WIDE), ("dark", PHONE)], ids=["light", "dark phone"]
)
def test_plots_have_axes_and_words(browser, judged: Path, scheme: str, viewport: dict[str, int]):
    shown = tab(browser, viewport, color_scheme=scheme)
    shown.go(f"{url(judged)}#all")
    titles = shown.page.locator("#overview figcaption").all_inner_texts()
    assert titles == [
        "Accuracy against tokens", "Accuracy against the critical path", "Accuracy against wall time", "Width against size",
        "Distribution of parallelism",
    ]  # fmt: skip
    for figure in shown.page.locator("#overview figure").all():
        assert figure.locator("text.label").count() == 2
        assert figure.locator("text.tick").count() >= 4
        assert figure.locator("path.line").count() == 2
        assert "apr: " in figure.locator("svg").get_attribute("aria-label")
        sizes = figure.locator("text.tick").evaluate_all(
            "nodes => nodes.map(n => n.getBoundingClientRect().height)"
        )
        assert min(sizes) > 11, "it can be read"
    assert "66.7%" in shown.text("#overview tbody tr:first-child").replace("67%", "66.7%")
    assert shown.complaints == []


def test_a_sweep_has_a_plot_for_each_limit(browser, tmp_path: Path):
    levels = {"tokens-256": 4, "tokens-1024": 10, "seconds-2": 12}
    for name, solved in levels.items():
        tries = [(sampled("spawn", seed), seed < solved) for seed in range(12)]
        evaluation(tmp_path / name, {"apr": tries, "mcts": [(t, not right) for t, right in tries]})
    out = tmp_path / "page.html"
    out.write_text(render_page(read_entries(expand_sweeps([tmp_path])), "A sweep"))
    shown = tab(browser, WIDE)
    shown.go(f"{url(out)}#all")
    titles = shown.page.locator("#overview figcaption").all_inner_texts()
    assert titles[:2] == ["Accuracy under a limit of seconds", "Accuracy under a limit of tokens"]
    tokens = shown.page.locator("#overview figure").nth(1)
    assert {"256", "1024"} <= {*tokens.locator("text.tick").all_text_contents()}
    assert tokens.locator("circle.point").count() == 4
    words = tokens.locator("svg").get_attribute("aria-label")
    assert all(part in words for part in ("apr: 33%", "at 256, 83%", "at 1024", "mcts: 67%"))
    assert "means over all of them" in shown.text("#overview")
    assert shown.complaints == []


OVERLAPS = """() => [...document.querySelectorAll('#overview figure svg, #lanes-head svg')].flatMap(s => {
    const boxes = [...s.querySelectorAll('text')].map(n => [n.textContent, n.getBoundingClientRect()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
        .filter(([, q]) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
        .map(([b]) => [a, b]));
})"""


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_no_text_of_a_plot_covers_another(browser, judged: Path, viewport: dict[str, int]):
    """Also with large numbers: the text of the ticks makes room for the label of the axis."""
    shown = tab(browser, viewport)
    shown.go(f"{url(judged)}#all")
    for factor in (1, 1e3, 1e6):
        shown.page.evaluate(
            "f => { for (const e of known.entries) for (const k of ['tokens', 'critical', 'branches', 'wall']) e[k] *= f; drawOverview() }",
            factor,
        )
        assert shown.page.locator("#overview figure").count() == 5
        assert shown.page.evaluate(OVERLAPS) == []
        shown.page.evaluate("document.querySelector('#overview .plots').append(scatterPlot([]))")
        assert shown.page.evaluate(OVERLAPS) == []


def test_methods_that_solve_nothing_are_lines_next_to_one_another(browser, judged: Path):
    shown = opened(browser, judged)
    shown.page.evaluate(
        "{ for (const [k, e] of known.entries.slice(0, 9).entries()) addEntry({...e, method: 'none ' + k % 3, correct: false}); drawOverview() }"
    )
    figure = shown.page.locator("#overview figure").first
    assert figure.locator("path.area").count() == 2, "only of the methods that have solved something"
    starts = figure.locator("path.line").evaluate_all(
        "nodes => nodes.map(n => n.getBBox().y + n.getBBox().height)"
    )
    assert len(starts) == 5
    assert len({round(y) for y in starts[2:]}) == 3, "each can be seen"


def test_no_row_is_marked_while_the_overview_is_shown(browser, judged: Path):
    shown = opened(browser, judged)
    marked = shown.page.locator("#rows [aria-selected=true]")
    assert marked.count() == 0
    assert shown.page.get_attribute("#rows", "aria-activedescendant") is None
    shown.page.locator("#rows [role=option]").nth(2).click()
    shown.until("view.entry?.id === 2")
    assert marked.get_attribute("id") == shown.page.get_attribute("#rows", "aria-activedescendant") == "row-2"
    shown.page.click("#to-overview")
    assert marked.count() == 0
    shown.page.focus("#rows")
    assert marked.count() == 1, "the keyboard has a place"


def test_a_narrow_screen_shows_the_complete_table(browser, judged: Path):
    shown = tab(browser, PHONE)
    shown.go(f"{url(judged)}#all")
    cells = shown.page.locator("#overview td").evaluate_all(
        "nodes => nodes.map(n => [n.getBoundingClientRect().right, n.scrollWidth - n.clientWidth])"
    )
    assert cells
    assert max(right for right, _ in cells) <= PHONE["width"]
    assert max(hidden for _, hidden in cells) <= 0
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_longest_branch_off_the_critical_path_is_explained(browser, report: Path, made):
    shown = opened(browser, report, 0)
    assert "critical path" not in shown.text("#caption")
    spans = list(made["plain"].spans)
    k = next(i for i, s in enumerate(spans) if s.path == (1, 2) and s.role == "body")
    shown.page.evaluate(
        """k => {
            const own = new Set([...view.t.spans.keys()].filter(i => nameOf(view.t.spans[i].path) === '1.2'));
            view.t.spans[k].tokens = 500;
            view.t.spans.forEach((span, i) => { if (!own.has(i)) span.parents = span.parents.filter(p => !own.has(p)); });
            view.axis = 'tokens';
            const at = view.t.spans.findLastIndex(s => !s.path.length);
            view.t.spans[at].tokens = 2000;
            drawTimeline();
        }""",
        k,
    )
    assert shown.text("#caption").endswith(
        "Branch 1.2 is the longest, but not on the critical path: nothing that follows had to wait for it."
    )


def test_shares_have_wilson_bounds(browser, judged: Path):
    shown = opened(browser, judged)
    for (right, attempts), bounds in {
        (0, 10): (0, 0.2775),
        (50, 200): (0.1950, 0.3143),
        (10, 10): (0.7225, 1),
    }.items():
        assert shown.page.evaluate(f"bounds({right}, {attempts})") == pytest.approx(bounds, abs=1e-4)
    assert shown.page.locator("#overview figure:nth-child(1) path.area").count() == 2
    assert shown.page.evaluate("within(50, 200)") == "25% (20% to 31%)"


def test_of_many_methods_one_has_its_bounds(browser, tmp_path: Path):
    tried = [(forked(), True), (forked(), False)]
    shown = opened(browser, written(evaluation(tmp_path, {f"method {k}": tried for k in range(6)})))
    bands = shown.page.locator("#overview figure:nth-child(1) path.area:visible")
    assert bands.count() == 0
    shown.page.hover("#overview tbody tr:nth-child(3) button")
    assert bands.count() == 1
    assert bands.get_attribute("data-method") == "2"


def test_a_method_stands_out_and_its_attempts_are_listed(browser, judged: Path):
    shown = opened(browser, judged)
    shown.page.hover("#overview tbody tr:nth-child(2) button")
    faint = "[...document.querySelectorAll('#overview .line')].map(n => n.classList.contains('faint'))"
    assert shown.page.evaluate(faint) == [True, False] * 5
    shown.page.locator("#overview tbody tr:nth-child(2) button").press("Enter")
    assert all(name.startswith("sequential") for name in names(shown))
    assert shown.page.evaluate("document.activeElement.id") == "rows"
    shown.page.mouse.move(1, 1)
    assert not any(shown.page.evaluate(faint))


def test_nothing_is_wider_than_a_phone(browser, judged: Path):
    for entry in (None, 1):
        shown = opened(browser, judged, entry, viewport=PHONE)
        for _ in range(2):
            assert shown.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
            shown.page.click("#to-overview")
    shown = opened(browser, judged, viewport=PHONE)
    assert shown.page.locator("#list").is_visible()
    shown.page.locator("#rows [role=option]").nth(1).click()
    shown.page.wait_for_selector("#lanes .lane")
    assert not shown.page.locator("#list").is_visible()
    shown.page.click(".back")
    assert shown.page.locator("#list").is_visible()
    shown.page.go_back()
    shown.until("document.body.dataset.view === 'detail'")


def test_nothing_moves_for_who_wants_it_calm(browser, judged: Path):
    for motion, expected in (("reduce", 0), ("no-preference", 1)):
        shown = opened(browser, judged, 1, reduced_motion=motion)
        moving = shown.page.evaluate(
            "[...document.querySelectorAll('*')].filter(n => parseFloat(getComputedStyle(n).transitionDuration) > 0).length"
        )
        assert (moving > 0) == bool(expected)


# Hostile texts


ELEMENT_COUNTS = "Object.entries(Object.groupBy(document.querySelectorAll('*'), n => n.tagName)).map(([k, v]) => [k, v.length])"
SHOWN_TEXT = "[...document.querySelectorAll('#reader [data-span]')].map(n => n.textContent).join('')"


def test_a_hostile_text_changes_nothing(browser, tmp_path: Path):
    path = many(tmp_path / "texts.jsonl", {text: saying(text) for text in ("a benign text", *HOSTILE)})
    shown, counts = opened(browser, written(path), 0), []
    for k, text in enumerate(("a benign text", *HOSTILE)):
        shown.page.evaluate("k => openEntry(known.entries[k])", k)
        shown.until(f"view.entry.id === {k}")
        shown.page.locator('[data-lane="1.1"]').click()
        counts.append(shown.page.evaluate(ELEMENT_COUNTS))
        assert shown.page.evaluate(SHOWN_TEXT) == plain(text * 2)
    assert counts == counts[:1] * len(counts)
    assert shown.page.evaluate("window.pwned") is None
    assert (shown.complaints, shown.page.title()) == ([], "A report")


def test_a_huge_text_is_shown_bit_by_bit(browser, tmp_path: Path):
    text = "x < y & z </script>\n" * 20_000
    path = many(tmp_path / "texts.jsonl", {"huge": saying(text)})
    shown = opened(browser, written(path), 0)
    shown.page.locator('[data-lane="1.1"]').click()
    visible = shown.page.evaluate(SHOWN_TEXT)
    assert visible
    assert len(visible) < 100_000
    assert text.startswith(visible)
    shown.page.click("#reader .more")
    assert shown.page.evaluate(SHOWN_TEXT) == text * 2


def test_nothing_is_asked_of_any_network(browser, judged: Path):
    shown = opened(browser, judged, 1)
    for axis in ("time", "tokens"):
        shown.page.locator(f"input[value={axis}]").check(force=True)
    shown.page.click("#to-overview")
    assert [r for r in shown.requests if not r.startswith("data:image/svg+xml,")] == [
        url(judged, 1).partition("#")[0]
    ]
    shown.page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    shown.page.evaluate("{ const image = new Image(); image.src = 'http://127.0.0.1:9/x.png' }")
    shown.page.evaluate(
        "{ const s = document.createElement('script'); s.append('window.pwned = 1'); document.body.append(s) }"
    )
    shown.page.wait_for_timeout(200)
    assert shown.page.evaluate("window.pwned") is None
    assert len(shown.complaints) >= 3
    assert all("Content Security Policy" in line or "TrustedScript" in line for line in shown.complaints)


# Thousands of them


def test_only_the_rows_that_can_be_seen_are_there(browser, tmp_path: Path):
    t = forked().to_json()
    path = tmp_path / "many.jsonl"
    path.write_text("".join(f'{{"id": "p{k}", "trajectory": {t}}}\n' for k in range(300)))
    shown = opened(browser, written(path))
    assert shown.page.locator("#rows [role=option]").count() < 30
    shown.page.locator("#rows").press("End")
    last = shown.page.locator("#row-299")
    assert last.get_attribute("aria-posinset") == last.get_attribute("aria-setsize") == "300"
    assert last.is_visible()
    assert shown.page.locator("#rows [role=option]").count() < 30


@pytest.mark.slow
def test_thousands_open_at_once(browser, tmp_path: Path):
    made = [json.loads(sampled("spawn", seed, width=6).to_json()) for seed in range(40)]
    path = tmp_path / "many.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"p{k}", "trajectory": made[k % 40]}) + "\n" for k in range(LARGE))
    )
    out = written(path)
    took = []
    for _ in range(3):
        shown = tab(browser)
        began = time.monotonic()
        shown.go(url(out))
        shown.page.wait_for_selector("#overview figure")
        took.append(time.monotonic() - began)
        began = time.monotonic()
        shown.page.fill("#find", "p1999")
        shown.page.locator("#rows [role=option]").click()
        shown.page.wait_for_selector("#lanes .lane")
        assert time.monotonic() - began < 2
    assert min(took) < 3, took
