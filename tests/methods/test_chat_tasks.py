"""Tasks of chats by name, from the entry points of installed packages."""

from __future__ import annotations

import importlib.metadata

import pytest

import sgl_apr as apr
from sgl_apr.evaluation.tasks.chat_template import CHATML
from sgl_apr.evaluation.tasks.mathematics import MathTask
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.methods import chat_tasks
from sgl_apr.methods.chat_tasks import chat_task, chat_task_names


def test_the_tasks_of_this_package():
    engine = apr.ScriptedEngine(lambda *_: "")
    assert chat_task_names() == ["question", "mathematics"]
    assert type(chat_task("question", engine, CHATML)) is QuestionTask
    task = chat_task("mathematics", engine, CHATML)
    assert type(task) is MathTask
    assert task.prompt("1 + 1?").text.startswith("<|im_start|>user\n1 + 1?")


def test_unknown_names_and_wrong_entry_points(monkeypatch: pytest.MonkeyPatch):
    engine = apr.ScriptedEngine(lambda *_: "")
    with pytest.raises(apr.AprError, match="no task 'questions', did you mean 'question'"):
        chat_task("questions", engine, CHATML)
    group = chat_tasks.ENTRY_POINT_GROUP
    wrong = (
        importlib.metadata.EntryPoint("missing", "sgl_apr.nothing:Task", group),
        importlib.metadata.EntryPoint("number", "sys:maxsize", group),
        importlib.metadata.EntryPoint("other", "pathlib:Path", group),
    )
    monkeypatch.setattr(chat_tasks, "installed_entry_points", lambda _: wrong)
    for name, message in (
        ("missing", "cannot be loaded"),
        ("number", "expected a subclass"),
        ("other", "expected a subclass"),
    ):
        with pytest.raises(apr.AprError, match=message):
            chat_task(name, engine, CHATML)
