"""The layout of the package: what stands at its root, who may import whom, and that nobody imports in a circle."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "sgl_apr"

# From the bottom up. A module imports from its own floor's folder and from floors below; folders on one floor are strangers.
FLOORS = (
    ("errors",),
    ("tokenizer", "trajectory"),
    ("formats",),
    ("engine",),
    ("runtime",),
    ("methods", "views"),
    ("evaluation", "server"),
    ("training",),
    ("cli",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in modules()} or {node.module}
    return {name for name in found if name in modules()}


@cache
def graph() -> dict[str, set[str]]:
    """Who imports whom, without what a package's own `__init__` hands on."""
    return {name: imports(path) - {name} for name, path in modules().items() if path.name != "__init__.py"}


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_root_holds_the_folders_and_three_files():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert folders == set(FLOOR) - {"tokenizer", "errors"}
    assert files == {"__init__.py", "__init__.pyi", "errors.py", "tokenizer.py", "py.typed"}


def test_nobody_imports_in_a_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_nobody_imports_from_a_floor_above_or_beside():
    upward = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in sorted(others)
        if folder(module) != folder(other) and folder(other) and FLOOR[folder(other)] >= FLOOR[folder(module)]
    ]
    assert not upward, "\n".join(upward)


def test_modules_are_short():
    long = {name: n for name, path in modules().items() if (n := len(path.read_text().splitlines())) > 350}
    assert not long


@pytest.mark.parametrize(
    "name", ["sgl_apr", *(f"sgl_apr.{n}" for n in FLOOR if n not in ("errors", "tokenizer", "cli"))]
)
def test_a_package_hands_on_what_it_lists(name: str):
    """Every listed name is there, and none is the name of a module, which would stand in its place once it is imported."""
    package = importlib.import_module(name)
    for exported in package.__all__:
        value = getattr(package, exported)
        is_module = f"{name}.{exported}" in modules() or (PACKAGE / exported).is_dir()
        assert not is_module or inspect.ismodule(value), exported


# Words of an earlier vocabulary. Each has a standard term: sequence, allowance, join, in parallel, after, at most.
RETIRED_NAMES = {
    "strand", "purse", "stitch", "stitched", "desk", "wish", "envelope", "tally", "told", "said", "heard", "asked",
    "apart", "behind", "hinders", "whole", "most", "least",
}  # fmt: skip
RETIRED_PROSE = re.compile(
    r"\b(strands?|purses?|stitch(es|ed|ing)?|in a line|side by side|behind(?! (a|the|an|one) (router|proxy))|at the (most|least)|begins? anew)\b",
    re.IGNORECASE,
)
PROSE = (*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PACKAGE.rglob("*.py"))


def words(identifier: str) -> set[str]:
    """The words of a name in snake case or in camel case."""
    return set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", identifier).lower().split("_"))


def identifiers(path: Path) -> set[str]:
    """The names that a module defines: classes, functions, parameters, variables and attributes."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def test_no_name_is_a_retired_word():
    retired = {
        f"{name}: {identifier}"
        for name, path in modules().items()
        for identifier in identifiers(path)
        if words(identifier) & RETIRED_NAMES
    }
    assert not retired


def test_no_prose_has_a_retired_word():
    retired = [
        f"{path.relative_to(ROOT)}:{number}: {found[0]}"
        for path in PROSE
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (found := RETIRED_PROSE.search(line))
    ]
    assert not retired, "\n".join(retired)


@pytest.mark.parametrize("name", ["sgl_apr"])
def test_a_public_name_has_one_definition(name: str):
    """No two modules define a class of one name, so that an import can be read without its module."""
    defined: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                defined.setdefault(node.name, []).append(module)
    assert {name: where for name, where in defined.items() if len(where) > 1} == {}
