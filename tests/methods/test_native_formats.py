"""Formats of models that fork by themselves, as methods: their prompts, joins and labels."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.chat_template import PLAIN
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods import MethodResult, method

DIALECTS = {name: name for name in ("threadweaver", "multiverse", "npr", "parallel_r1", "parathinker")} | {
    "apr": "spawn"
}


def asked(name: str, tags: tuple[str, ...], **options: Any) -> tuple[MethodResult, list[str]]:
    """What it comes to where the model only ever says 42, and the prompts of its requests."""
    engine = apr.ScriptedEngine(lambda request, prompt: "Answer: 42", apr.ByteTokenizer(tags))
    task = QuestionTask(engine, PLAIN)
    result = asyncio.run(method(name)(engine, "Why?", task=task, **options))
    return result, [engine.tokenizer.decode(r.input_ids) for r in engine.requests]


@pytest.mark.parametrize("name", DIALECTS)
def test_prompts_are_those_of_the_authors_and_labels_say_what_was_run(name: str):
    dialect = apr.dialect(DIALECTS[name])
    result, prompts = asked(name, dialect.tags)
    assert result.method == name
    assert result.answer.endswith("42")
    assert result.trajectory.dialect == dialect.name
    assert all(prompt.startswith("Why?") for prompt in prompts)
    instruction = apr.preset(name).instruction if name not in ("parathinker", "apr") else ""
    assert instruction in prompts[0]
    style = ["parathinker-style"] if name == "parathinker" else []
    joined = ["joined by text"] if dialect.published_join == "kv" else []  # which this engine does not do
    assert result.label == (", ".join(style + joined) or "exact")


def test_a_model_without_the_tags_is_forced():
    result, _ = asked("threadweaver", ())
    assert result.label == "by grammar alone: the model does not know its tags"


@pytest.mark.parametrize("name", ["threadweaver", "multiverse"])
def test_an_unavailable_join_is_an_error(name: str):
    with pytest.raises(apr.KvJoinUnavailable):
        asked(name, apr.dialect(name).tags, join="kv")


@pytest.mark.parametrize(
    ("options", "tags", "forks"),
    [
        ({"budget": apr.Budget(tokens=511)}, True, False),
        ({"budget": apr.Budget(tokens=512)}, True, True),
        ({"budget": {"tokens": 511}}, True, False),
        ({"budget": apr.Budget(tokens=511), "mode": "auto"}, True, True),
        ({"budget": apr.Budget(tokens=511, seconds=60)}, True, True),  # forks save time
        ({"budget": apr.Budget(tokens=511)}, False, True),  # a model that is forced to fork anyway
    ],
)
def test_apr_forks_where_its_budget_pays_for_that(options: dict[str, Any], tags: bool, forks: bool):
    spawn = apr.dialect("spawn")
    fork = "<Spawn>\n<Message>1:a</Message>\n<Message>2:b</Message>\n</Spawn>"
    texts = iter([fork, *["<Return>1</Return>"] * 2, "Answer: 42"])
    engine = apr.ScriptedEngine(
        lambda request, prompt: next(texts) if forks else "Answer: 42",
        apr.ByteTokenizer(spawn.tags if tags else ()),
    )
    task = QuestionTask(engine, PLAIN)
    assert task.min_fork_tokens == 512
    result = asyncio.run(method("apr")(engine, "Why?", task=task, **options))
    assert result.answer.endswith("42")
    assert len(result.trajectory.blocks) == forks
    assert ("one reply: 511 tokens do not pay for a fork" in result.label) == (not forks)
