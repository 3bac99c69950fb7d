"""Branch prompts: registered by name, loaded from entry points when they are used, and checked when a dialect is made."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import sgl_apr as apr
from sgl_apr.formats import BranchPrompt, branch_prompts, register_branch_prompt
from sgl_apr.formats.branch_prompts import branch_prompt, branch_prompt_names
from sgl_apr.formats.grammar import grammar_path

SPAWN = grammar_path("spawn").read_text()


def test_the_default_passes_the_outline_on():
    prompt = branch_prompt("outline")
    assert prompt.make_prompt("the context", "count to 3") == "count to 3"
    assert prompt.extract_result(" 1 2 3 \n") == "1 2 3"


def test_a_registered_prompt_is_found():
    mine = BranchPrompt(lambda context, outline: f"{context}: {outline}", str.upper)
    with pytest.raises(
        apr.GrammarError, match=r"mine.lark: no branch prompt 'mine', expected one of .*outline"
    ):
        apr.Dialect.from_source("mine", SPAWN, branch_prompt="mine")
    register_branch_prompt("mine", mine)
    dialect = apr.Dialect.from_source("mine", SPAWN, branch_prompt="mine")
    assert branch_prompt(dialect.branch_prompt) is mine
    assert "mine" in branch_prompt_names()


def test_countdown_is_an_entry_point_of_its_task():
    prompt = branch_prompt(apr.dialect("apr").branch_prompt)
    context = (
        "Moving to Node #0\nCurrent State: 27:[22, 26, 31, 53], Operations: []\n"
        "Generated Node #0,0: 27:[26, 31, 31] Operation: 53-22=31\n"
    )
    assert prompt.make_prompt(context, "0,0") == (
        "Moving to Node #0,0\nCurrent State: 27:[26, 31, 31], Operations: ['53-22=31']\n"
    )
    assert prompt.make_prompt(context, "0,9") == "Moving to Node #0,9\n"
    assert prompt.extract_result("No\n27,27 equal: Goal Reached\n the path \n") == "the path\n"
    assert prompt.extract_result("no goal here") == ""


def test_a_dialect_does_not_load_its_branch_prompt():
    code = (
        "import sys, sgl_apr as apr\n"
        "apr.dialect('apr')\n"
        "print([m for m in sys.modules if m.startswith('sgl_apr.evaluation')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_entry_point_has_to_be_a_branch_prompt(monkeypatch: pytest.MonkeyPatch):
    wrong = EntryPoint("wrong", "json:dumps", branch_prompts.ENTRY_POINT_GROUP)
    monkeypatch.setattr(branch_prompts, "installed_entry_points", lambda group: (wrong,))
    with pytest.raises(apr.GrammarError, match=r"json:dumps of 'wrong' is .*, expected a BranchPrompt"):
        branch_prompt("wrong")


def test_an_unknown_prompt_lists_the_known():
    with pytest.raises(apr.GrammarError, match="no branch prompt 'nope', expected one of countdown, outline"):
        branch_prompt("nope")
