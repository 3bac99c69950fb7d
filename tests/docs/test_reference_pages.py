"""The reference pages name every option and every exception of the package, with the defaults of the code."""

from __future__ import annotations

import argparse
import ast
import builtins
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

import sgl_apr as apr
from sgl_apr import methods
from sgl_apr.cli.eval_tables import print_results
from sgl_apr.runtime.branch_scoring import BranchScoring
from sgl_apr.runtime.budget import Budget
from sgl_apr.runtime.events import Event
from sgl_apr.runtime.options import REQUEST_FIELDS, ReasonOptions
from sgl_apr.runtime.pacing import Pacing
from sgl_apr.runtime.retry import Retry
from sgl_apr.server import constants
from sgl_apr.server.api.config import add_api_arguments
from sgl_apr.server.api.limits import LIMIT_FLAGS, RequestLimits
from sgl_apr.server.api.options import OPTION_NAMES
from sgl_apr.server.guard.limits import add_guard_arguments
from tests.support.doc_runner import PAGES, name
from tests.support.paths import DOCS, ROOT

OPTIONS = DOCS / "reference" / "options.md"
ERRORS = DOCS / "errors.md"
SECTIONS = {
    ReasonOptions: "Options of a run",
    Budget: "Budget",
    Pacing: "Pacing",
    Retry: "Retry",
    BranchScoring: "Scoring",
}
ENTRY_POINT_GROUPS = {"sgl_apr.dialects", "sgl_apr.branch_prompts", "sgl_apr.chat_tasks"}
NAMED_DEFAULTS = {"dialect"}  # the page describes these in words


@cache
def section(title: str) -> str:
    """The text of a section of the options page, its subsections included."""
    found = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", OPTIONS.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found, f"options.md has no section {title!r}"
    return found[1]


def default_of(option: Field[object]) -> str:
    """The default of a field as the page writes it."""
    if option.default_factory is not MISSING:
        name = getattr(option.default_factory, "__name__", "")
        return "{}" if name == "dict" else f"{name}()"
    if is_dataclass(option.default):
        kind = type(option.default)
        assert option.default == kind()
        return f"{kind.__name__}()"
    return json.dumps(option.default) if isinstance(option.default, str) else repr(option.default)


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_option_is_listed_with_its_default(kind: type):
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section(SECTIONS[kind]), re.MULTILINE))
    assert set(rows) == {option.name for option in fields(kind)}
    listed = {name: default.strip("`") for name, default in rows.items() if name not in NAMED_DEFAULTS}
    assert listed == {o.name: default_of(o) for o in fields(kind) if o.name not in NAMED_DEFAULTS}


def test_request_fields_and_names_of_the_http_api_are_listed():
    assert [name for name in REQUEST_FIELDS if f"`{name}`" not in section("Options of a run")] == []
    api = section("The `apr` object of the HTTP API")
    assert [name for name in OPTION_NAMES if f"`{name}`" not in api] == []


def test_flags_of_the_server_are_listed():
    listed = set(re.findall(r"`(--apr-[\w-]+)", section("Flags of `sgl-apr serve`")))
    parser = argparse.ArgumentParser(add_help=False)
    add_api_arguments(parser)
    add_guard_arguments(parser)
    assert listed == {flag for action in parser._actions for flag in action.option_strings}
    assert {field for field, _, _ in LIMIT_FLAGS.values()} == {
        option.name for option in fields(RequestLimits)
    }


def test_switches_are_listed():
    private = {
        constants.LAUNCHED_ENV,
        constants.CACHE_SECRET_ENV,
        constants.GENERATED_SECRET_ENV,
        constants.MODEL_MODULE_ENV,
    }
    switches = {value for name, value in vars(constants).items() if name.endswith("_ENV")} - private
    listed = set(re.findall(r"^\| `(SGLANG_APR_\w+)`", section("Environment variables"), re.MULTILINE))
    assert listed == switches


def exception_classes() -> Iterator[str]:
    """The public exception classes that modules of the package define."""
    bases: dict[str, set[str]] = {}
    for path in Path(ROOT / "sgl_apr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}

    def is_exception(name: str) -> bool:
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, BaseException):
            return True
        return any(is_exception(base) for base in bases.get(name, ()) if base != name)

    return (name for name in sorted(bases) if is_exception(name) and not name.startswith("_"))


def test_every_exception_is_explained():
    names = list(exception_classes())
    assert {"AprError", "BranchFailed", "UsageError", "LayoutError", "GraphError", "Inapplicable"} <= set(
        names
    )
    page = ERRORS.read_text()
    assert [name for name in names if f"`{name}`" not in page] == []


def test_every_event_is_listed_with_its_fields():
    page = (DOCS / "runtime.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)\(([^)]*)\)` \|", page, re.MULTILINE))
    assert set(rows) == {kind.__name__ for kind in get_args(Event)}
    for kind in get_args(Event):
        listed = rows[kind.__name__]
        assert listed == "..." or listed.split(", ") == [field.name for field in fields(kind)]


def test_columns_of_the_evaluation_table_are_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    print_results("countdown", [], False)
    headings = next(line for line in capsys.readouterr().out.splitlines() if "method" in line)
    columns = {heading.strip() for heading in headings.split("\u2503")} - {"", "method", "accuracy", "95% CI"}
    cells = re.findall(r"^\| (.*?) \|", (DOCS / "evaluating.md").read_text(), re.MULTILINE)
    assert columns <= {name for cell in cells for name in cell.split(", ")}


def test_every_method_and_family_of_tasks_is_listed():
    rows = set(
        re.findall(
            r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", (DOCS / "methods.md").read_text(), re.MULTILINE))
        )
    )
    assert [name for name in methods.METHOD_NAMES if name not in rows] == []
    bases = {"Task", "SearchTask"}
    tasks = {name for name in methods.__all__ if name.endswith("Task")} - bases
    families = {name for name in tasks if issubclass(getattr(methods, name), methods.Task)}
    assert len(families) >= 8
    assert families <= rows


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_names_of_the_package_that_a_page_uses_exist(page: Path):
    text = page.read_text()
    paths = set(re.findall(r"(?<!::: )\bsgl_apr(?:\.\w+)+", text)) - ENTRY_POINT_GROUPS
    assert [path for path in sorted(paths) if not resolves(path)] == []
    calls = set(re.findall(r"(?<![\w.`])apr\.([A-Za-z]\w*)\(|`apr\.([A-Za-z]\w*)\(", text))
    assert {a or b for a, b in calls} <= set(apr.__all__)


TRAINERS = {"trl", "omegaconf"}  # what is missing where they are


def resolves(path: str) -> bool:
    """Whether a dotted path is a module, or a name in one."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            module = ROOT.joinpath(*parts[:end]).with_suffix(".py")
            if (
                error.name in TRAINERS and module.is_file()
            ):  # it imports one, which has an environment of its own
                text = module.read_text()
                return all(re.search(rf"^class {part}\b", text, re.MULTILINE) for part in parts[end:])
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_messages_that_troubleshooting_quotes_are_in_the_code():
    source = "".join(path.read_text() for path in Path(ROOT / "sgl_apr").rglob("*.py"))
    page = (DOCS / "troubleshooting.md").read_text()
    rows = re.search(r"\| message, or symptom .*?\n\n", page, re.DOTALL)
    assert rows
    quoted = [
        *re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (.*?) \|", rows[0], re.MULTILINE))),
        "another run writes to ...",
    ]
    parts = [part.strip() for message in quoted for part in message.split("...") if part.strip()]
    assert len(parts) > 8
    assert [part for part in parts if part not in source] == []
