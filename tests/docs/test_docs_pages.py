"""Every page of the documentation, as it stands: what it shows runs, and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

import sgl_apr as apr
from tests.support.doc_runner import DOCS, PAGES, ROOT, blocks, name, run, server_of

ALONE = [page for page in PAGES if blocks(page) and not server_of(page)]
COMMANDS = (
    "serve",
    "report",
    "eval",
    "plot",
    "train",
    "doctor",
)  # those that are more than a function's front
OTHERS = [ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", [*ALONE, *OTHERS], ids=name)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(page, tmp_path, None, monkeypatch)


def test_every_page_has_its_place():
    placed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(placed) == sorted(map(name, PAGES))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_wants_no_network(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(https?:[^"]*)"', path.read_text()
        )
        assert not fetched, (path, fetched)
    for path in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", path.read_text()), path


def test_diagrams_are_whole_and_take_their_colours_from_the_page():
    drawn = re.findall(r"<svg.*?</svg>", (DOCS / "concepts.md").read_text(), re.DOTALL)
    assert len(drawn) == 4
    styles = (DOCS / "assets" / "diagrams.css").read_text()
    for text in drawn:
        found = ElementTree.fromstring(text)
        assert found.get("aria-label")
        assert not re.search(r"#[0-9a-fA-F]{3,6}|\b(fill|stroke)=", text), (
            "else it is lost in one of the schemes"
        )
        for element in found.iter():
            for word in (element.get("class") or "").split():
                assert re.search(rf"\.{word}\b", styles), word


def test_every_public_name_is_in_the_reference():
    told = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert [
        n for n in apr.__all__ if n != "methods" and not re.search(rf"^::: [\w.]+\.{n}$", told, re.MULTILINE)
    ] == []


def test_how_to_cite_it_says_what_the_package_is():
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (told["version"], told["license"]) == (project["version"], project["license"])
    cited = {found["identifiers"][0]["value"].removeprefix("arXiv:") for found in told["references"]}
    related = (DOCS / "related.md").read_text()
    assert all(number in related for number in cited - {"2312.07104"}), "SGLang's own is no related format"


def test_what_users_notice_is_in_the_changelog():
    told = (ROOT / "CHANGELOG.md").read_text()
    assert told.index("## [Unreleased]") < told.index("### Added")
    missing = [command for command in COMMANDS if f"sgl-apr {command}" not in told]
    assert missing == []
