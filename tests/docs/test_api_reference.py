"""The API reference: every exported name is documented once, and every documented name exists."""

from __future__ import annotations

import re
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

import sgl_apr as apr
from tests.support.paths import DOCS, ROOT

PACKAGE = ROOT / "sgl_apr"
FOLDERS = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in PACKAGE.rglob("__init__.pyi")
    if path.parent != PACKAGE
)
DOCUMENTED = [
    path
    for page in sorted((DOCS / "api").glob("*.md"))
    for path in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]


def resolve(path: str) -> Any:
    """The module, class, function or constant at a dotted path."""
    parent, _, name = path.rpartition(".")
    try:
        return getattr(import_module(parent), name)
    except AttributeError:
        return import_module(path)


def test_every_folder_with_public_names_is_checked():
    assert {"sgl_apr.runtime", "sgl_apr.training.models"} <= set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_exported_name_is_documented(folder: str):
    package = import_module(folder)
    missing = [
        name
        for name in package.__all__
        if f"{folder}.{name}" not in DOCUMENTED
        and not (
            isinstance(getattr(package, name), ModuleType)
            and any(path.startswith(f"{folder}.{name}.") for path in DOCUMENTED)
        )
    ]
    assert missing == [], f"add `::: {folder}.NAME` to a page in docs/api"


def test_every_name_of_the_package_is_documented():
    """Wherever its home is: `apr.Budget` is `sgl_apr.runtime.Budget`."""
    documented = {id(resolve(path)) for path in DOCUMENTED}
    public = [name for name in apr.__all__ if not isinstance(getattr(apr, name), ModuleType)]
    assert [name for name in public if id(getattr(apr, name)) not in documented] == []


def test_every_documented_name_exists_and_is_documented_once():
    assert sorted(DOCUMENTED) == sorted(set(DOCUMENTED))
    values = [resolve(path) for path in DOCUMENTED]
    assert all(value is not None for value in values)
    assert len({id(value) for value in values}) == len(values)


@pytest.mark.parametrize("path", DOCUMENTED)
def test_a_documented_name_is_documented_where_users_import_it(path: str):
    """By its folder, if the folder exports it: `sgl_apr.runtime.Budget`, not `sgl_apr.runtime.budget.Budget`."""
    parent, _, name = path.rpartition(".")
    exported_by = [
        folder
        for folder in FOLDERS
        if name in import_module(folder).__all__ and getattr(import_module(folder), name) is resolve(path)
    ]
    assert not exported_by or parent in exported_by
