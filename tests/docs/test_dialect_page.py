"""The page on dialects of your own, as it stands: its file is a dialect, its example is a reply of it."""

from __future__ import annotations

import asyncio
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.formats import dialects
from sgl_apr.formats.entry_points import load_entry_point
from tests.support.doc_runner import blocks, checked, commands
from tests.support.masked_sampler import Masked, SampledEngine
from tests.support.paths import DOCS

PAGE = (DOCS / "dialects.md").read_text()


def block(language: str) -> str:
    return re.findall(rf"```{language}[^\n]*\n(.*?)```", PAGE, re.DOTALL)[0]


@pytest.fixture
def debate(tmp_path: Path) -> apr.Dialect:
    path = tmp_path / "debate.lark"
    path.write_text(block("lark"))
    return apr.Dialect.from_file(path)


def test_the_example_is_a_reply(debate: apr.Dialect):
    text = block("text").removesuffix("\n")
    trajectory = debate.parse(text)
    assert [(b.outline, b.text) for b in trajectory.blocks[0].branches] == [
        ("tea", "Tea keeps you calm."),
        ("coffee", "Coffee wakes you up."),
    ]
    assert trajectory.blocks[0].conclusion == "It depends on the hour."
    assert trajectory.answer == "So drink both."
    assert debate.render(trajectory) == text
    wrong = apr.read(text.replace("</Case 1>", "</Case 2>"), debate)
    assert [d.name for d in wrong.defects] == ["number of the closer"]


@pytest.mark.parametrize("mode", ["tokens", "text"])
def test_it_runs(debate: apr.Dialect, mode: str):
    engine = SampledEngine(Masked(debate.tags if mode == "tokens" else ()))
    for _ in range(20):
        budget = apr.Budget(tokens=600, outline_chars=8)
        trajectory = asyncio.run(apr.areason(engine, "Q: ", debate, mode="parallel", budget=budget))
        debate.validate(trajectory.text)
        assert trajectory.blocks
        assert trajectory.metrics().total <= 600


def test_every_rule_and_fact_is_on_the_page():
    for fact in apr.dialect("threadweaver").__dataclass_fields__:
        assert fact in ("name", "source") or f"`{fact}`" in PAGE, fact


def test_an_entry_point_is_found_by_name(debate: apr.Dialect, monkeypatch: pytest.MonkeyPatch):
    """As an installed package would have it."""
    point = EntryPoint("debate", "my_package:debate", dialects.ENTRY_POINT_GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: debate)
    monkeypatch.setattr(dialects, "installed_entry_points", lambda group: (point,))
    load_entry_point.cache_clear()
    try:
        assert apr.dialect("debate") is debate
        assert "debate" in apr.dialect_names()
        monkeypatch.setattr(EntryPoint, "load", lambda self: "no dialect")
        load_entry_point.cache_clear()
        with pytest.raises(apr.GrammarError, match="expected a Dialect"):
            apr.dialect("debate")
    finally:
        load_entry_point.cache_clear()


@pytest.mark.parametrize("repetition", range(2))
def test_a_command_of_the_page_registers_the_dialect_for_one_test(
    repetition: int, debate: apr.Dialect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Checking `sgl-apr serve --apr-dialect debate.lark` registers it. Else a later test finds the one of this test."""
    monkeypatch.chdir(tmp_path)
    assert "debate" not in apr.dialect_names()
    (serve,) = (block for block in blocks(DOCS / "dialects.md") if "--apr-dialect" in block.text)
    for words in commands(serve.text):
        checked(words, serve)
    assert apr.dialect("debate") == debate
