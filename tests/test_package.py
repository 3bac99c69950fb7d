"""The package from outside: the cost of its import, what it exports, and its optional dependencies."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import sgl_apr as apr
from sgl_apr.errors import require_extra
from tests.support.paths import ROOT


def test_import_is_light():
    """Neither torch nor sglang, also for everything pure."""
    code = (
        "import sys, sgl_apr as apr\n"
        "t = apr.dialect('threadweaver').parse('hello', apr.ByteTokenizer())\n"
        "import sgl_apr.training.training_tree, sgl_apr.training.rewards, sgl_apr.training.advantages\n"
        "import sgl_apr.training.trl, sgl_apr.training.verl, sgl_apr.training.rewrite.rewriter, sgl_apr.evaluation.tasks.countdown.problems\n"
        "t.metrics(); apr.Trajectory.from_json(t.to_json()); apr.Budget(); apr.ScriptedEngine\n"
        "print([m for m in ('torch', 'sglang', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", apr.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(apr, name) is not None


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="No sgl_apr attribute nope"):
        _ = apr.nope


def test_every_error_is_in_the_tree():
    errors = [getattr(apr, n) for n in apr.__all__ if n.endswith(("Error", "Exceeded", "Failed", "Timeout"))]
    assert all(issubclass(e, apr.AprError) for e in errors)


def plot(directory: Path) -> None:
    from sgl_apr.evaluation.metrics import MethodResults
    from sgl_apr.evaluation.plots import plot_methods

    plot_methods([MethodResults("apr", [])], directory / "figure.pdf")


def plot_log(directory: Path) -> None:
    from sgl_apr.evaluation.plots import plot_training_log

    plot_training_log(directory / "log.jsonl", directory / "log.png", ["loss"])


def compare_formulas(directory: Path) -> None:
    from sgl_apr.evaluation.tasks.mathematics import MathAnswer

    assert MathAnswer("17/34") == MathAnswer("0.50")  # no other test compares these, so none is cached


def search(directory: Path) -> None:
    from sgl_apr.evaluation.tasks.question import QuestionTask
    from sgl_apr.methods.registry import method

    engine = apr.ScriptedEngine(lambda request, prompt: "Answer: 4")
    asyncio.run(method("mcts")(engine, "2 + 2?", task=QuestionTask(engine)))


def generate(directory: Path) -> None:
    from sgl_apr.evaluation.benchmarks.registry import benchmark

    benchmark("gym:ab", 1)


@pytest.mark.parametrize(
    ("module", "use", "message"),
    [
        ("matplotlib", plot, "plots need matplotlib: pip install 'matplotlib>=3.8' (the extra plot)"),
        ("matplotlib", plot_log, "plots need matplotlib: pip install 'matplotlib>=3.8' (the extra plot)"),
        (
            "math_verify",
            compare_formulas,
            "answers of mathematics need math-verify: pip install 'math-verify>=0.9' (the extra eval)",
        ),
        (
            "treequest",
            search,
            "the method mcts needs treequest: pip install 'treequest==0.3.3' (the extra mcts)",
        ),
        (
            "reasoning_gym",
            generate,
            "gym:ab needs reasoning-gym: pip install 'reasoning-gym==0.1.25' (the extra gym)",
        ),
    ],
)
def test_an_error_names_the_extra_of_a_missing_package(
    module: str, use: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(apr.MissingExtra) as raised:
        use(tmp_path)
    assert str(raised.value) == message


def test_an_installed_package_is_no_error():
    require_extra("json", "all", "never shown")


def test_the_extras_are_declared_and_installed_by_make():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["all"] == ["sgl-apr[eval,plot,mcts,gym,mcp]"]
    pinned = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    wanted = [d for name in ("eval", "plot", "mcts", "gym") for d in extras[name]] + project["dependencies"]
    names = {d.partition("=")[0].rstrip(">~").replace("_", "-") for d in wanted}
    assert names <= pinned


def test_training_ends_well_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    from argparse import Namespace

    from sgl_apr.cli.train import _finish

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _finish(Namespace(out=tmp_path, json=False), tmp_path / "model", ["loss"], {})
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'model'}\n"
    assert (
        printed.err == "no log.png: plots need matplotlib: pip install 'matplotlib>=3.8' (the extra plot)\n"
    )
