"""README, change log, citation and the files for contributors: their form, and that they agree with the code."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import import_module

import pytest
import yaml

import sgl_apr as apr
from benchmarks.common.figures import percent
from tests.support.doc_runner import blocks
from tests.support.paths import DOCS, ROOT

README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
README_SECTIONS = [
    "Install",
    "Quick start",
    "Results",
    "Features",
    "Formats",
    "OpenAI requests",
    "Command line",
    "Limits",
    "Documentation",
    "Development",
    "Citation and licence",
]
# Commands that are more than a call of one function.
COMMANDS = ("serve", "report", "eval", "plot", "train", "doctor")


def test_the_readme_has_its_sections_and_its_length():
    assert re.findall(r"^## (.+)$", README, re.MULTILINE) == README_SECTIONS
    assert 150 <= len(README.splitlines()) <= 200


def test_the_readme_shows_what_its_quick_start_prints():
    assert any(block.prints for block in blocks(ROOT / "README.md"))


def test_figures_of_the_readme_are_those_of_the_benchmarks():
    results = {
        name: entry["found"] for name, entry in json.loads((DOCS / "benchmarks.json").read_text()).items()
    }
    sequential, _, reinforced = results["quality.countdown"]["rows"]
    dialects = results["masks.mask_latency"]["dialects"].values()
    largest = next(
        row for row in results["kv_join.latency"]["rows"] if (row["branches"], row["tokens"]) == (8, 1024)
    )
    methods = {row["method"]: row for row in results["quality.methods"]["rows"]}
    forked, alone = (
        f"{methods[name]['critical_path']:.0f} tokens, {methods[name]['accuracy']:.0%} solved"
        for name in ("multiverse", "sequential")
    )
    rows = [
        (percent(reinforced["accuracy"]), f"{percent(sequential['accuracy'])}: "),
        (
            f"{sum(row['forked'] for row in dialects):,} of {sum(row['runs'] for row in dialects):,}",
            f"{sum(row['valid_grammar_off'] for row in dialects)} without",
        ),
        (forked, f"{alone}: the same model"),
        (f"{results['runtime.overhead']['wall_ratio_vs_serial']:.2f}", "1: "),
        (f"{largest['kv_s']:.2f} s in the KV cache", f"{largest['text_s']:.2f} s as text"),
    ]
    table = re.findall(
        r"^\| .* \| (.+?) \| (.+?) \| `.+` \|$", README.partition("## Results")[2], re.MULTILINE
    )
    assert len(table) == len(rows)
    for (ours, other), (expected, compared) in zip(table, rows, strict=True):
        assert ours == expected
        assert other.startswith(compared)


def test_every_format_is_in_the_readme():
    section = README.partition("## Formats")[2].partition("## ")[0]
    listed = re.findall(r"^\| \[`(\w+)`\]\(grammars/(\w+)\.lark\) \|", section, re.MULTILINE)
    assert sorted(listed) == sorted((path.stem, path.stem) for path in (ROOT / "grammars").glob("*.lark"))


def test_how_to_cite_it_says_what_the_package_is():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (apr.__version__, project["license"])
    cited = {entry["identifiers"][0]["value"].removeprefix("arXiv:") for entry in citation["references"]}
    related = (DOCS / "related.md").read_text()
    assert all(number in related for number in cited - {"2312.07104"}), "SGLang's paper is no related format"


def test_what_users_notice_is_in_the_changelog():
    assert CHANGELOG.index("## [Unreleased]") < CHANGELOG.index("### Added")
    assert [command for command in COMMANDS if f"sgl-apr {command}" not in CHANGELOG] == []


def test_renamed_names_of_the_changelog_are_those_of_the_package():
    rows = re.findall(
        r"^\| names of `sgl_apr` \| now \|\n\|---\|---\|\n((?:\|.*\n)+)", CHANGELOG, re.MULTILINE
    )
    assert rows
    for row in rows[0].splitlines():
        old, new = (re.findall(r"`(\w+)`", cell) for cell in row.strip("|").split("|"))
        assert len(old) == len(new)
        assert [name for name in new if not hasattr(apr, name)] == []
        assert [name for name in old if name in apr.__all__] == []


def test_dotted_names_of_the_changelog_exist():
    tables = re.findall(r"^\| other names \| now \|\n\|---\|---\|\n((?:\|.*\n)+)", CHANGELOG, re.MULTILINE)
    for row in tables[0].splitlines():
        for path in re.findall(r"`([\w.]+\.\w+)`", row.strip("|").split("|")[1]):
            if path[0].islower():
                parent, _, name = path.rpartition(".")
                assert hasattr(import_module(f"sgl_apr.{parent}"), name), path


def test_ci_runs_lint_and_tests():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"make lint", "make test"} <= set(steps)


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda p: p.stem
)
def test_issue_forms_are_valid(form):
    fields = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(fields)
    questions = [entry for entry in fields["body"] if entry["type"] != "markdown"]
    assert all(entry["attributes"]["label"] for entry in questions)
    assert len({entry["id"] for entry in questions}) == len(questions)
