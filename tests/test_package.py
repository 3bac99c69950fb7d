"""The package from outside: what importing costs, and what it exports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sgl_apr as apr


def test_import_is_light():
    """Neither torch nor sglang, also for everything pure."""
    code = (
        "import sys, sgl_apr as apr\n"
        "t = apr.dialect('threadweaver').parse('hello', apr.ByteTokenizer())\n"
        "import sgl_apr.training.training_tree, sgl_apr.training.rewards, sgl_apr.training.advantages\n"
        "import sgl_apr.training.trl_verl, sgl_apr.training.rewrite.rewriter, sgl_apr.evaluation.tasks.countdown.problems\n"
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
