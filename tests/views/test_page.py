"""The page as a file: what is read, what it contains, and that no text of a model can end its element."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import zlib
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.evaluation.metrics import AttemptMetrics
from sgl_apr.evaluation.report_files import count_trajectories, describe_evaluations, read_entries
from sgl_apr.evaluation.store import open_evaluation
from sgl_apr.formats.dialects import dialect_names
from sgl_apr.views.page import render_live_page, render_page, safe_json
from sgl_apr.views.page_entry import PageEntry, lane_extents, list_row
from tests.runtime.test_loop import scripted
from tests.support.masked_sampler import SampledEngine, masked

HOSTILE = (
    "</script><script>window.pwned = 1</script>", "<!--<script>", "]]>--></style><img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>", "\u2028\u2029 {{script}} {{data}} &lt;b&gt;", "\u202egnp.exe\u2066", "a\x00b\x1b[31m\r\n\tc",
    "\ud800 half \udfff", "😀 e\u0301 " + "Z\u0335\u0336" * 40, "javascript:alert(1)", "${alert(1)} `", "\\u003c/script>",
)  # fmt: skip


def ran(work: Coroutine[Any, Any, apr.Trajectory]) -> apr.Trajectory:
    """In a thread of its own: that of a test with a browser has a loop already."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def sampled(name: str, seed: int = 0, width: int = 3) -> apr.Trajectory:
    """A trajectory of any dialect, nested where it nests."""
    dialect = apr.dialect(name)
    budget = apr.Budget(tokens=2000, width=min(width, dialect.max_width), depth=min(3, dialect.max_depth))
    engine = SampledEngine(masked(name), seed=seed)
    return ran(apr.areason(engine, "Q: ", name, mode="parallel", budget=budget))


def forked() -> apr.Trajectory:
    return ran(apr.areason(scripted(), "Q: "))


def saying(text: str) -> apr.Trajectory:
    """A fork whose every text, outline and label is this, between benign tags."""
    ids = (1, 2, 3)
    prompt = apr.Span("prompt", "prompt", text, ids, ())
    header = apr.Span("header", "injected", text, ids, (0,), (1, 1), text)
    body = apr.Span("body", "decoded", text, ids, (1,), (1, 1), text, "stop", outline=text)
    return apr.Trajectory((prompt, header, body, apr.Span("text", "decoded", text, ids, (2,))), text)


def evaluation(directory: Path, attempts: dict[str, list[tuple[apr.Trajectory, bool]]]) -> Path:
    """What `sgl-apr eval ... -o directory` writes."""
    with open_evaluation(
        directory, {"task": "countdown", "model": "builtin", "seed": 0, "split": "test"}
    ) as store:
        for method, tried in attempts.items():
            for number, (t, right) in enumerate(tried):
                m = t.metrics()
                figures = (m.total, m.critical_path, m.longest_context, m.branches, m.blocks)
                measured = AttemptMetrics(f"problem {number}", 3 + number % 2, right, *figures, label="exact")
                store.add(method, number, measured, 1.0, t.answer, t)
    return directory


def many(path: Path, trajectories: dict[str, apr.Trajectory]) -> Path:
    """What `apr.run_many` writes."""
    lines = (
        f'{{"id": {json.dumps(name)}, "trajectory": {t.to_json()}}}\n' for name, t in trajectories.items()
    )
    path.write_text("".join(lines), errors="surrogatepass")
    return path


class Elements(HTMLParser):
    """The elements of a file, and the contents of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._in = f"{tag} {dict(attrs).get('id', '')}" if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in:
            self.scripts[self._in] = self.scripts.get(self._in, "") + data

    def index(self) -> list[dict]:
        index = json.loads(self.scripts["script index"])
        return [dict(zip(index["columns"], values, strict=True)) for values in index["rows"]]

    def packed(self, number: int) -> dict:
        return json.loads(zlib.decompress(base64.b64decode(self.scripts[f"script t{number}"])))


# Files


def test_an_evaluation_is_read(tmp_path: Path):
    t = forked()
    directory = evaluation(tmp_path / "out", {"apr": [(t, True), (t, False)], "sequential": [(t, True)]})
    entries = list(read_entries([directory]))
    assert entries == list(read_entries([directory / "run.jsonl"]))
    assert [(e.name, e.method, e.correct, e.size) for e in entries] == [
        ("problem 0", "apr", True, 3),
        ("problem 1", "apr", False, 4),
        ("problem 0", "sequential", True, 3),
    ]
    assert all(e.trajectory == t and e.answer == t.answer == "Done." for e in entries)
    assert describe_evaluations([directory]) == "countdown, model builtin, split test, seed 0"
    assert count_trajectories([directory]) == 3


def test_a_report_compares_methods_on_the_same_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    t = forked()
    directory = evaluation(tmp_path / "out", {"apr": [(t, True), (t, False)], "sequential": [(t, True)]})
    run = directory / "run.jsonl"
    head, *lines = map(json.loads, run.read_text().splitlines())
    lines += [{**line, "seed": 5} for line in lines if line["number"] == 0]
    lines = [{"seed": 0, **line} for line in lines]
    run.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    assert main(["report", str(directory), "-o", str(tmp_path / "page.html"), "--json"]) == 0
    printed, err = capsys.readouterr()
    assert json.loads(printed)["trajectories"] == 4
    left_out = "1 problem is left out: not all of apr, sequential attempted it"
    assert err.strip() == left_out
    text = (tmp_path / "page.html").read_text()
    assert f"countdown, model builtin, split test, seeds 0, 5 · {left_out}" in text
    assert len(Elements(text).index()) == 4


def test_what_run_many_wrote_is_read(tmp_path: Path):
    made = {"a": forked(), "b": sampled("multiverse")}
    path = many(tmp_path / "many.jsonl", made)
    assert [(e.name, e.trajectory, e.method) for e in read_entries([path])] == [
        ("a", made["a"], "threadweaver"),
        ("b", made["b"], "multiverse"),
    ]
    assert (describe_evaluations([path]), count_trajectories([path])) == ("", 2)


def test_of_several_files_methods_go_by_both_names(tmp_path: Path):
    t = forked()
    paths = [evaluation(tmp_path / name, {"apr": [(t, True)]}) for name in ("twin", "other")]
    paths.append(many(tmp_path / "more.jsonl", {"x": t}))
    assert [e.method for e in read_entries(paths)] == ["twin apr", "other apr", "more threadweaver"]
    assert count_trajectories(paths) == 3


def test_half_a_line_at_the_end_is_passed_over(tmp_path: Path):
    path = many(tmp_path / "many.jsonl", {"a": forked()})
    path.write_bytes(path.read_bytes() + b'{"id": "b", "traj')
    assert ([e.name for e in read_entries([path])], count_trajectories([path])) == (["a"], 1)


HEAD = '{"task": "countdown"}\n'
LINE = '"method": "apr", "problem": "p", "size": 3, "correct": true, "label": "", "answer": ""'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense\n", "line 1: expected a JSON object, found no JSON"),
        ("[1]\n", "line 1: expected a JSON object, found list"),
        (HEAD + f"{{{LINE}}}\n", "line 2: no trajectory: an older version"),
        (HEAD + f'{{{LINE}, "trajectory": {{}}}}\n', "line 2: not a trajectory"),
        (HEAD + '{"method": "apr"}\n', "line 2: no trajectory"),
        ('{"id": "a", "trajectory": 3}\n', "line 1: not a trajectory"),
        ("", "no trajectory in"),
        (HEAD, "no trajectory in"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, capsys, text: str, message: str):
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "x.html")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("sgl-apr: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


# The command


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys):
    path, out = many(tmp_path / "many.jsonl", {"a": forked()}), tmp_path / "x.html"
    assert main(["report", str(path), "-o", str(out), "--title", "A <title>"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "<title>A &lt;title&gt;</title>" in out.read_text()
    assert main(["report", str(path), "-o", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"page": str(out), "trajectories": 1, "bytes": out.stat().st_size}


@pytest.mark.parametrize("argv", [["/nowhere/at.all"], ["{path}", "-o", "/nowhere/x.html"]])
def test_what_is_not_there_is_said(tmp_path: Path, capsys, argv: list[str]):
    path = many(tmp_path / "many.jsonl", {"a": forked()})
    assert main(["report", *(a.format(path=path) for a in argv)]) == 1
    assert "/nowhere" in capsys.readouterr().err


# What is in the page


@pytest.mark.parametrize("name", dialect_names())
def test_figures_are_those_of_the_metrics(name: str):
    t = sampled(name)
    m, row = t.metrics(), list_row(PageEntry("p", t, "method"))
    assert row == {
        "name": "p", "method": "method", "label": "", "answer": t.answer, "correct": None, "size": None, "limit": None, "limit_value": None, "tokens": m.total,
        "critical": m.critical_path, "context": m.longest_context, "inside": m.branch_tokens, "blocks": m.blocks,
        "branches": m.branches, "wall": round(m.wall_s, 3), "calls": m.engine_calls, "prompt": m.prompt_tokens,
        "cached": m.cached_tokens, "again": m.reprefilled_tokens, "tools": 0, "tool_s": 0.0, "critical_tool_s": 0.0,
        "shape": lane_extents(t),
    }  # fmt: skip


def test_all_of_a_trajectory_is_there_but_its_token_ids():
    t = forked()
    packed = Elements(render_page([PageEntry("p", t)])).packed(0)
    expected = json.loads(t.to_json())
    for span in expected["spans"]:
        span["tokens"] = len(span.pop("token_ids"))
    assert packed["spans"] == expected["spans"]
    assert [c["phase"] for c in packed["calls"]] == [c.phase for c in t.calls]
    assert [c["cached_tokens"] for c in packed["calls"]] == [c.cached_tokens for c in t.calls]
    assert packed["wall"] == t.wall_s


def test_a_thinghas_the_trunk_and_its_branches():
    spans = (
        apr.Span("prompt", "prompt", "", (0,) * 50, ()),
        apr.Span("fork", "decoded", "", (0,) * 10, (0,)),
        apr.Span("body", "decoded", "", (0,) * 20, (1,), (1, 1)),
        apr.Span("body", "decoded", "", (0,) * 40, (1,), (1, 2)),
        apr.Span("result", "injected", "", (0,) * 10, (1,), (1, 1), waits_for=(2,)),
        apr.Span("text", "decoded", "", (0,) * 20, (4, 3)),
    )
    assert lane_extents(apr.Trajectory(spans, "x")) == [0, 100, 14, 43, 14, 71], "in percent of 70 tokens"


def test_a_text_without_tokens_is_refused():
    with pytest.raises(apr.AprError, match="parsed from text"):
        render_page([PageEntry("p", apr.dialect("threadweaver").parse("42"))])


# Hostile texts


@given(st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_ends_no_element(value):
    text = safe_json(value)
    assert text.isascii()
    assert not re.search("[<>&]", text)
    assert json.loads(text) == value


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_data(text: str):
    benign = render_page([PageEntry("p", saying("p"), "p", "p", "p", True, 3)], "title")
    hostile = render_page([PageEntry(text, saying(text), text, text, text, True, 3)], "title")
    assert Elements(hostile).tags == Elements(benign).tags
    assert Elements(hostile).index()[0]["name"] == text
    assert Elements(hostile).packed(0)["spans"][0]["text"] == text
    strip = re.compile(r'id="index">.*?</script>|id="t0">.*?</script>', re.DOTALL)
    assert strip.sub("", hostile) == strip.sub("", benign), "only the text differs"


@pytest.mark.parametrize(
    "made", [render_page([PageEntry("p", forked())]), render_live_page()], ids=["file", "live"]
)
def test_the_policy_lets_its_own_script_run_and_nothing_else(made: str):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', made)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    scripts = Elements(made).scripts
    for rule, element in (("script-src", "script "), ("style-src", "style ")):
        digest = base64.b64encode(hashlib.sha256(scripts[element].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["form-action"] == rules["base-uri"] == "'none'"
    assert rules.get("connect-src") == ("'self'" if "generate" in scripts["script "] else None)
    assert set(re.findall(r"https?://[^'\" )]*", made)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function)\b", scripts["script "]
    )
    assert ("fetch" in scripts["script "]) == ("connect-src" in rules), "a file cannot send requests"


# Colours


def colours(css: str) -> list[dict[str, tuple[int, ...]]]:
    """The variables that are plain colours, of the light and of the dark scheme."""
    light, dark = (
        {name: tuple(bytes.fromhex(value)) for name, value in re.findall(r"--([\w-]+): #([0-9a-f]{6})", part)}
        for part in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    )
    return [light, dark]


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """WCAG 2.2, 1.4.3."""

    def luminance(colour: tuple[int, ...]) -> float:
        linear = [
            c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int):
    palette = colours(Elements(render_live_page()).scripts["style "])[scheme]
    for text in ("ink", "soft", "accent", "right", "wrong", "warn"):
        for ground in ("paper", "card", "sunk"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
    assert contrast(palette["on-accent"], palette["accent"]) >= 4.5
    for thing in (
        "edge",
        "decoded",
        "injected",
        "cached",
        "prefilled",
        "prompt",
        *(f"hue-{k}" for k in range(8)),
    ):
        for ground in ("paper", "card"):
            assert contrast(palette[thing], palette[ground]) >= 3, (thing, ground)
    assert contrast(palette["ink"], palette["mark"]) >= 4.5, (
        "the critical path is marked, and has edges in ink"
    )
