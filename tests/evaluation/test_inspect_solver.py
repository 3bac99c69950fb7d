"""Methods in Inspect's own evaluations, on a scripted engine; needs the optional extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sgl_apr as apr

inspect_ai = pytest.importorskip("inspect_ai", reason="pip install 'sgl-apr[inspect]'")
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.scorer import match  # noqa: E402
from inspect_ai.solver import Solver, prompt_template, solver  # noqa: E402

from sgl_apr.evaluation.inspect_solver import method_solver, reasoning  # noqa: E402
from sgl_apr.server.launch.launcher import Server  # noqa: E402

SUMS = [Sample(input="One and one?", target="2"), Sample(input="Two and two?", target="4")]


class Opened(apr.ScriptedEngine):
    """Records that it was closed."""

    closed = 0

    async def __aenter__(self) -> Opened:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.closed += 1


def evaluated(tmp_path: Path, how: Solver, **more: Any) -> Any:
    """The log that Inspect wrote of an evaluation."""
    task = inspect_ai.Task(dataset=SUMS, solver=how, scorer=match(), **more)
    (log,) = inspect_ai.eval(task, model="none", log_dir=str(tmp_path), display="none", log_format="json")
    assert log.status == "success", log.error
    return log


def test_inspect_evaluates_a_method(tmp_path: Path):
    engine = Opened(lambda request, prompt: f"I think.\nAnswer: {2 if 'One' in prompt else 5}")

    async def connect() -> Opened:
        return engine

    @solver
    def voting() -> Solver:
        return method_solver(connect, "self_consistency", n=3, budget=apr.Budget(tokens=2000))

    log = evaluated(tmp_path, [prompt_template("{prompt}\nIn digits."), voting()])
    assert log.results.scores[0].metrics["accuracy"].value == 0.5
    assert engine.closed == 2
    assert all("In digits." in apr.ByteTokenizer().decode(r.input_ids) for r in engine.requests)
    for sample, answer in zip(log.samples, ("2", "5"), strict=True):
        assert sample.output.completion == answer
        assert sample.messages[-1].text == answer
        made = apr.Trajectory.from_json(json.dumps(sample.output.metadata["trajectory"]))
        assert len(made.blocks[0].branches) == 3
        assert sample.output.usage.output_tokens == made.metrics().total
        assert sample.output.metadata["label"] == "exact"


def test_a_failing_engine_is_an_error_of_the_sample(tmp_path: Path):
    log = evaluated(tmp_path, reasoning(url="http://127.0.0.1:9", budget="tokens=100"), fail_on_error=False)
    assert all("no server at http://127.0.0.1:9" in sample.error.message for sample in log.samples)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"method": "guess"}, "no method 'guess'"), ({"task": "chess"}, "no task 'chess'"), ({"budget": "x"}, "budget 'x'")],
)  # fmt: skip
def test_an_unknown_method_or_task_is_an_error(wrong: dict[str, str], message: str):
    with pytest.raises(apr.AprError, match=message):
        reasoning(**wrong)


@pytest.mark.server
def test_the_registered_solver_runs_on_a_server(server: Server, tmp_path: Path):
    log = evaluated(tmp_path, reasoning("sequential", server.url, budget="tokens=64", temperature=0.0))
    assert all(0 < sample.output.usage.output_tokens <= 64 for sample in log.samples)
