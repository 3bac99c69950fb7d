"""Examples in docstrings: each returns what it shows, and stands in a section that the API reference shows as code."""

from __future__ import annotations

import ast
import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.test_architecture import name_of

MODULES = [path for path in sorted((ROOT / "sgl_apr").rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_examples_return_what_they_show(path: Path):
    result = doctest.testmod(import_module(name_of(path)))
    assert result.failed == 0


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_examples_stand_in_a_section(path: Path):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        ast.get_docstring(n) or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, documented)
    ]
    loose = [text for text in docstrings if re.search(r"^>>> ", text, re.MULTILINE)]
    assert not loose, 'put the example under "Examples:", indented'
