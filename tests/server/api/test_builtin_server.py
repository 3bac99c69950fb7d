"""What the built-in model shows over HTTP: it forks without a grammar, and has no chat template."""

from __future__ import annotations

import json

import pytest
import requests

import sgl_apr as apr
from sgl_apr.evaluation.tasks.countdown.problems import Problem
from sgl_apr.runtime.event_json import event_from_json
from sgl_apr.server.api.limits import RequestLimits
from sgl_apr.server.api.options import OptionsParser, ReasonRequest
from sgl_apr.server.launch.launcher import Server

PROBLEMS = [Problem((3, 7, 8, 12), 24), Problem((2, 5, 9, 11), 37), Problem((4, 6, 10, 13), 58)]


def widths(server: Server, options: dict) -> list[int]:
    """How many branches the forks of the built-in model have, if it is told to make six.

    The trajectories are streamed, so the time limit is for 32 tokens, not for all 900 of a trajectory.
    """
    found: list[int] = []
    for problem in PROBLEMS:
        body = {"prompt": problem.prompt(width=6), "temperature": 0, "constrain": False, "stream": True}
        url = f"{server.url}/apr/generate"
        with requests.post(url, json={**body, **options}, stream=True, timeout=60) as response:
            assert response.ok, response.text
            *lines, end = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
        assert end == b"[DONE]"
        trajectory = apr.rebuild(event_from_json(json.loads(line)) for line in lines)
        found += [len(block.branches) for block in trajectory.blocks]
    return found


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(1500)
def test_the_width_holds_without_the_grammar(solver: Server):
    budget = {"tokens": 1200, "branch_tokens": 60}
    assert max(widths(solver, {"budget": budget})) > 2, "the model itself wants more"
    narrow = widths(solver, {"budget": {**budget, "width": 2}})
    assert narrow
    assert max(narrow) == 2


@pytest.mark.server
def test_weak_branches_end_by_the_confidence_of_the_model(solver: Server):
    body = {"prompt": PROBLEMS[0].prompt(width=4), "mode": "parallel", "temperature": 0}
    response = requests.post(
        f"{solver.url}/apr/generate", json={**body, "scoring": {"keep": 0.5}}, timeout=60
    )
    assert response.ok, response.text
    trajectory = apr.Trajectory.from_dict(response.json())
    outcomes = [branch.outcome for branch in trajectory.blocks[0].branches]
    assert outcomes.count("ok") >= 1
    assert "aborted" in outcomes
    assert {limit.limit for limit in trajectory.limits} == {"value"}


@pytest.mark.server
@pytest.mark.parametrize(
    "options", [{}, {"apr": {}}, {"apr": {}, "stream": True}], ids=["stock", "apr", "stream"]
)
def test_a_chat_needs_a_chat_template(solver: Server, options: dict):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, **options}
    response = requests.post(f"{solver.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 400
    for text in ("no chat template", "/v1/completions", "--chat-template"):
        assert text in response.text


def test_the_operators_width_is_that_of_a_request_without_the_grammar():
    parser = OptionsParser(RequestLimits(width=2), apr.ByteTokenizer(), 2000, 300)
    _, options = parser.parse(ReasonRequest([1], {"constrain": False}))
    assert (options.constrain, options.budget.width) == (False, 2)
    with pytest.raises(apr.BudgetExceeded, match="--apr-max-width 2"):
        parser.parse(ReasonRequest([1], {"constrain": False, "budget": {"width": 3}}))
