"""Options of methods: whatever value a client sends, the method runs within its budget or refuses it with a typed error."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from inspect import signature
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods.registry import METHOD_MODULES, check_arguments, method

VALUES = ("x", "", 5, -1, 0, 2.5, [1], {"a": 1}, ["x"])
FIXED = [name for name, module in METHOD_MODULES.items() if name == module]
OPTIONS = [
    (name, option.name)
    for name in FIXED
    for option in signature(method(name)).parameters.values()
    if option.kind is option.KEYWORD_ONLY and option.name not in ("task", "allow_code", "limits")
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_any_value_of_an_option_is_taken_or_refused(name: str, option: str):
    code = {"allow_code": True} if name == "recursive" else {}
    for value in VALUES:
        engine = apr.ScriptedEngine(lambda request, prompt: "1. so\nScore: 3\nAnswer: so")
        given = {option: value, "budget": {"tokens": 400}, **code}

        async def run(engine: apr.ScriptedEngine = engine, given: dict[str, Any] = given) -> Any:
            return await method(name)(engine, "Why?", task=QuestionTask(engine), **given)

        with suppress(apr.AprError):
            check_arguments(name, QuestionTask, given)
            result = asyncio.run(asyncio.wait_for(run(), 30))
            assert result.metrics.total <= 400
        assert not engine.active


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("self_consistency", {"stop": 3}, "stop=3, expected 'beta', 'dirichlet' or 'cges'"),
        ("pacore", {"widths": "ab"}, "widths='ab', expected"),
        ("group_think", {"enough": "all"}, "enough='all', expected a valid integer"),
        ("value_guided", {"threshold": "low"}, "threshold='low', expected a valid number"),
        ("best_of_n", {"verifier": 5}, "verifier=5, expected"),
    ],
)
def test_types_are_those_of_the_annotations(name: str, options: dict[str, Any], message: str):
    with pytest.raises(apr.AprError) as raised:
        check_arguments(name, QuestionTask, options)
    assert message in str(raised.value)
