"""Every page of the documentation that needs no server: its code runs, and prints what the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.support.doc_runner import DOCS, PAGES, ROOT, blocks, name, run, server_of
from tests.test_architecture import FLOOR

WITHOUT_SERVER = [page for page in PAGES if blocks(page) and not server_of(page)]
OTHER_PAGES = [ROOT / "CONTRIBUTING.md"]
TOP_LEVEL = [ROOT / file for file in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES_WITH_DIAGRAMS = {"concepts.md": 4, "architecture.md": 1}


@pytest.mark.parametrize("page", [*WITHOUT_SERVER, *OTHER_PAGES], ids=name)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(page, tmp_path, None, monkeypatch)


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(map(name, PAGES))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path: Path):
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


@pytest.mark.parametrize("page", PAGES_WITH_DIAGRAMS)
def test_diagrams_are_complete_and_take_their_colours_from_the_page(page: str):
    diagrams = re.findall(r"<svg.*?</svg>", (DOCS / page).read_text(), re.DOTALL)
    assert len(diagrams) == PAGES_WITH_DIAGRAMS[page]
    styles = (DOCS / "assets" / "diagrams.css").read_text()
    for text in diagrams:
        diagram = ElementTree.fromstring(text)
        assert diagram.get("aria-label")
        assert not re.search(r"#[0-9a-fA-F]{3,6}|\b(fill|stroke)=", text), (
            "a fixed colour is invisible in the light or in the dark scheme"
        )
        for element in diagram.iter():
            for css_class in (element.get("class") or "").split():
                assert re.search(rf"\.{css_class}\b", styles), css_class


@pytest.mark.parametrize("page", TOP_LEVEL, ids=name)
def test_links_of_top_level_pages_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]+)?\)", page.read_text())
    for file, anchor in links:
        target = ROOT / file if file else page
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor[1:] in [slug(heading) for heading in headings], f"{file}{anchor}"


def slug(heading: str) -> str:
    """The anchor of a heading, as MkDocs and GitHub write it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


def exists(path: str) -> bool:
    """Whether a path of the repository, of the package, or of one of its folders exists."""
    bases = (ROOT, ROOT / "sgl_apr", *(ROOT / "sgl_apr" / folder for folder in FLOOR), ROOT / "benchmarks")
    return any((base / path).exists() for base in bases)


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", DOCS / "architecture.md"], ids=name)
def test_paths_that_a_page_names_exist(page: Path):
    paths = set(re.findall(r"`((?:\w[\w.]*/)+[\w.]*|\w+\.(?:py|md|toml))`", page.read_text()))
    ignored = {"site/", "grammars/NAME.lark"}
    assert [path for path in sorted(paths - ignored) if not exists(path)] == []


def test_every_folder_of_the_package_is_on_the_architecture_page():
    rows = set(re.findall(r"^\| `(\w+)(?:/|\.py)` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE))
    assert set(FLOOR) <= rows
